#!/usr/bin/env python3
"""Write text with a model: `python sample.py runs/gpt-shakespeare --prompt "ROMEO:"`, `python sample.py smollm2
--interactive`, or with the directory or GGUF file of a published model; an encoder-decoder translates a --source. With
--input PROMPTS.jsonl --output TEXTS.jsonl a file of prompts becomes a file of texts.

Text goes to standard output, speeds to standard error.
"""

import dataclasses
import sys
from pathlib import Path
from typing import cast

import jax
import numpy as np

import tx_jax as tx
from tx_jax.batch_job import write_file
from tx_jax.checkpoint import best_step, latest_step
from tx_jax.command_line import keep_compiled, one_line_errors, parse
from tx_jax.convert.pretrained import Source
from tx_jax.convert.sources import AnyTokenizer, end_ids, find_source, is_run, open_source, open_tokenizer
from tx_jax.data.chat import encode_chat
from tx_jax.data.subwords import Subwords
from tx_jax.decoding.prompts import prepare
from tx_jax.decoding.samplers import OF_DRAWS, check_sampler
from tx_jax.errors import InputError, require
from tx_jax.evaluation import bits_per_byte, n_bytes
from tx_jax.run_dir import read_config
from tx_jax.run_list import list_sources
from tx_jax.sample_args import OF_AUTOMATA, OTHERS, Args, rules_of
from tx_jax.translate_lines import translate_lines
from tx_jax.writing import Writer, complete, converse, encode, messages, read_prompt, show, tokens_of

DEFAULT_TEMPERATURE = {False: 0.8, True: 0.0}  # of a text that goes on, and of an answer: greedy, as in transformers


@one_line_errors()
def main(argv: list[str]) -> None:
    """Check all that is asked for, load, generate, print. Nothing is asked for: list what can be."""
    if not argv:
        print(
            *list_sources(),
            "",
            "Take one: python sample.py NAME --prompt TEXT, or --source; --help has all.",
            sep="\n",
        )
        return
    args = parse(Args, argv, prog="sample.py")
    keep_compiled()
    said = None if args.prompt is None else read_prompt(args.prompt)
    path = find_source(args.model)
    run = is_run(path)
    if run:
        step = {None: latest_step, "best": best_step}.get(args.step, lambda _: args.step)(path)
        args = dataclasses.replace(args, step=step)
    source = open_source(path, cast(int | None, args.step))
    if args.int8:
        source = source._replace(load=lambda *how, load=source.load: tx.quantize(load(*how)))
    if args.source is not None:
        translate_lines(args, path, source)
        return
    if args.perplexity is not None:
        print_perplexity(args.perplexity, path, source)
        return
    if args.json_schema is not None:
        args = dataclasses.replace(args, json_schema=read_schema(args.json_schema))
    writer, chats = prepare_writer(args, path, source.cfg, source.special_ids)
    trained = read_config(path) if run else None
    own = trained and trained.train.sample_prompt  # a text to go on from, no message
    writer = writer._replace(prefix_lm=trained is not None and trained.data.objective == "prefix_lm")
    kept = None if run else writer.model.cfg.dtype  # of the parameters

    def load() -> dict:
        params = source.load(kept, None)
        return tx.fuse(params) if jax.default_backend() == "cpu" else params  # where it is measured to be faster

    if args.input is not None:
        settings = dataclasses.asdict(args) | {"model": str(path.resolve()), "dtype": writer.model.cfg.dtype}
        write_file(writer, load, settings, chats=chats)
        return
    asked = args.interactive or said is not None or own is not None
    require(asked, f"{args.model} has no prompt of its own; give --prompt TEXT")
    ids, echo = np.zeros(0, np.int32), ""
    if chats and said is not None:
        ids = encode_chat(cast(Subwords, writer.tokenizer), messages(args.system, said))
    elif not args.interactive:
        echo = cast(str, own) if said is None else said
        ids = encode(writer.tokenizer, echo, writer.ends)
        chats = False
    if not args.interactive:
        prepare(writer.model, ids[None], None, writer.room(len(ids)), writer.sampler, writer.key, None)  # refuses now
    writer = writer._replace(params=load())
    if args.interactive:
        converse(writer, args.system)
    elif args.stream or (chats and args.num_samples == 1):
        show(writer, echo, tokens_of(writer, ids))
    else:
        complete(writer, echo, ids, args.num_samples)


def prepare_writer(args: Args, path: Path, cfg: tx.ModelConfig, special_ids: dict) -> tuple[Writer, bool]:
    """What writes, but for its parameters; and whether it answers rather than goes on."""
    run, tokenizer = is_run(path), open_tokenizer(path)
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"  # bfloat16 is slow on a CPU
    model = tx.build(dataclasses.replace(cfg, dtype=cfg.dtype if run and fast == "bfloat16" else fast))
    if not isinstance(model, tx.DecoderLM):
        raise InputError(f"model={args.model!r} is no decoder but of kind {cfg.stack}; {OTHERS[cfg.stack]}")
    if tokenizer is None:
        raise InputError(f"model={args.model!r} has no tokenizer; put its tokenizer.json beside the weights")
    chats = isinstance(tokenizer, Subwords) and tokenizer.chat_template is not None and not args.raw
    if run and latest_step(path) and not (args.interactive or args.system):
        chats = False  # it was trained to go on from running text
    for flag in ("interactive", "system"):
        require(chats or not getattr(args, flag), f"--{flag} is for a model with a chat template, without --raw")
    rules, ends = rules_of(args), end_ids(special_ids, tokenizer)
    drawn = args.num_samples > 1 or any(rules[name] is not None for name in OF_DRAWS)
    heat = DEFAULT_TEMPERATURE[chats and not drawn] if args.temperature is None else args.temperature
    sampler = tx.Sampler(**rules)._replace(temperature=heat or None)
    check_sampler(sampler, cfg.vocab_size, ends=bool(ends))
    new, key, automaton = args.max_new_tokens, jax.random.key(args.seed), automaton_of(args, tokenizer, ends)
    return Writer(model, {}, tokenizer, ends, new, sampler, key, args.stop, automaton), chats


def automaton_of(args: Args, tokenizer: AnyTokenizer, ends: tuple[int, ...]) -> tx.Automaton | None:
    """Where a text stops, or what it must match."""
    if all(getattr(args, name) in (None, ()) for name in OF_AUTOMATA):
        return None
    words = tx.token_bytes(tokenizer)
    ends = tuple(i for i in ends if i < len(words))
    if args.stop:
        return tx.stop_at(args.stop, words)
    if args.regex is not None:
        return tx.match_regex(args.regex, words, ends)
    return tx.match_json(cast(str, args.json_schema), words, ends)


def read_schema(given: str) -> str:
    """The schema that --json-schema stands for, in JSON."""
    return given if given.lstrip().startswith("{") else read_prompt(f"@{given.removeprefix('@')}", "json_schema")


def print_perplexity(given: str, path: Path, source: Source) -> None:
    """The perplexity of a text, by windows that overlap by half."""
    text, tokenizer, model = (
        read_prompt(given, "perplexity"),
        open_tokenizer(path),
        tx.build(dataclasses.replace(source.cfg, dtype="float32")),
    )
    if not isinstance(model, tx.DecoderLM) or tokenizer is None:
        raise InputError(f"{path} is no decoder with a tokenizer; --perplexity needs one")
    ids = tokenizer.encode(text)
    require(len(ids) > 1, f"perplexity={given!r:.40} has {len(ids)} tokens; give a text of at least two")
    found = tx.perplexity(model, source.load("float32", None), ids)
    bits = bits_per_byte(
        found.nats_per_token * found.n_tokens, max(n_bytes(tokenizer, ids[1:]), 1)
    )  # the first is given
    print(
        f"perplexity {found.perplexity:.4f} of {found.n_tokens:,} tokens, {found.nats_per_token:.4f} nats each, "
        f"{bits:.4f} bits per byte"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
