"""Write text with a model: `python sample.py runs/gpt-shakespeare --prompt "ROMEO:"`, `python sample.py smollm2
--interactive`, or with the directory or GGUF file of a published model; an encoder-decoder translates a --source. With
--input PROMPTS.jsonl --output TEXTS.jsonl a file of prompts becomes a file of texts.

Text goes to standard output, speeds to standard error.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any, cast

import jax
import numpy as np
import tyro

import tx_jax as tx
from tx_jax.batch_job import write_file
from tx_jax.checkpoint import latest_step
from tx_jax.command_line import keep_compiled, one_line_errors, parse
from tx_jax.convert.pretrained import Source
from tx_jax.convert.sources import AnyTokenizer, end_ids, find_source, is_run, open_source, open_tokenizer
from tx_jax.data.chat import encode_chat
from tx_jax.data.subwords import Subwords
from tx_jax.decoding.prompts import prepare
from tx_jax.decoding.samplers import OF_DRAWS, check_sampler
from tx_jax.errors import InputError, require
from tx_jax.evaluation import bits_per_byte, n_bytes
from tx_jax.inspect import check_picture, plot_translation
from tx_jax.run_dir import read_config
from tx_jax.writing import Writer, complete, converse, encode, messages, read_lines, read_prompt, say, show, tokens_of


@dataclasses.dataclass(frozen=True)
class Args:
    """Write text with a model."""

    # a run directory of train.py, a Hugging Face directory, a GGUF file, smollm2, or hf://ORG/NAME
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    prompt: str | None = None  # text; @FILE reads a file, - reads standard input; None: the run's sample_prompt
    input: str | None = None  # a file of prompts, one a line: {"prompt": …, "max_new_tokens": …, what is to be kept: …}
    output: str | None = None  # the file for their texts, in their order; the same command again goes on with it
    batch_size: int = 16  # texts of --input that are written at a time
    source: str | None = None  # of an encoder-decoder: a line to translate; @FILE, or - for a stream of lines
    n_beams: int = 4  # of the search for a translation; --temperature 0 is greedy, more than 0 draws instead
    n_best: int = 1  # translations of a line; with their scores, if several
    length_penalty: float = 0.6  # α of GNMT: scores are divided by ((5 + length) / 6)^α
    truncate: bool = False  # cut sources that are longer than the model's positions; otherwise they are refused
    show_attention: str | None = None  # draw what the first translation attends to in its source, to this .png or .svg
    perplexity: str | None = None  # how likely the model finds a text: @FILE, - or the text itself
    raw: bool = False  # go on from the prompt; otherwise a public model with a chat template answers it
    system: str | None = None  # what a chat begins with
    interactive: bool = False  # a conversation: a message a line
    max_new_tokens: int | None = None  # None: 500, or what the context leaves
    temperature: float | None = (
        None  # 0: always the likeliest token; None: 0.8, but 0 for one answer with no other rule
    )
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together reach p
    min_p: float | None = None  # keep tokens at least p times as likely as the likeliest
    typical_p: float | None = None  # keep the tokens of the most expected surprise that together reach p
    epsilon_cutoff: float | None = None  # keep tokens of at least this probability
    eta_cutoff: float | None = None  # the same, but less where the model is unsure
    repetition_penalty: float | None = None  # above 1: tokens of the text and its prompt become less likely
    presence_penalty: float | None = None  # is taken from the logits of tokens that were written
    frequency_penalty: float | None = None  # the same for each time
    no_repeat_ngram: int | None = None  # the text holds the same n tokens in a row once
    min_new_tokens: int | None = None  # before which no text ends
    stop: tuple[str, ...] = ()  # texts at which to stop; they are not shown
    regex: str | None = None  # whole texts that match it
    json_schema: str | None = None  # whole texts that are JSON of this schema: a file, or JSON as it stands
    seed: int = 0
    num_samples: int = 1
    stream: bool = False  # print each token as it comes; a chat does
    int8: bool = False  # read the weights in 8 bits: faster, in a quarter of the memory, and a little less exact
    step: int | None = None  # of a run's checkpoint; None: the newest

    def __post_init__(self) -> None:
        n, heat, new = self.num_samples, self.temperature, self.max_new_tokens
        require(n >= 1, f"num_samples={n} must be at least 1; leave it out for one")
        for flag in OF_SOURCES if self.source is None else ():
            given = getattr(self, flag) != getattr(type(self), flag)
            require(not given, f"--{flag.replace('_', '-')} is for a --source; give one, or leave it out")
        for flag in OF_OTHERS if self.input is not None else ():
            given = getattr(self, flag) != getattr(type(self), flag)
            require(not given, f"--{flag.replace('_', '-')} is not for --input; leave one out")
        rule = "--input and --output go together; give both, or leave both out"
        require((self.input is None) == (self.output is None), rule)
        sized = self.input is None and self.batch_size != 16
        require(not sized, "--batch-size is for --input; give one, or leave it out")
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        rules = [f"--{name.replace('_', '-')}" for name in OF_AUTOMATA if getattr(self, name) not in (None, ())]
        require(len(rules) < 2, f"{' and '.join(rules)} cannot both say where a text ends; leave one out")
        require(self.regex != "", "regex='' matches no text; give a pattern, or leave it out")
        streams = "--interactive" * self.interactive or "--stream" * self.stream
        require(n == 1 or not streams, f"num_samples={n} cannot be streamed; leave out {streams}, or ask for one")
        rule = f"n_beams={self.n_beams} must be at least 1, which is greedy, and n_best={self.n_best} at least 1"
        require(self.n_beams >= 1 and self.n_best >= 1, rule)
        require(heat is None or heat >= 0, f"temperature={heat} must be 0, which is greedy, or more")
        require(new is None or new >= 1, f"max_new_tokens={new} must be at least 1")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be from 0 to 2³² − 1")
        require(
            not (self.interactive and self.prompt), "--interactive reads what you type, not --prompt; leave one out"
        )


OTHERS = {
    "decoder": "give it a --prompt TEXT",
    "encoder_decoder": "give it a --source TEXT",
    "encoder": "it writes nothing; tx.encode_text is what it is for",
}
OF_SOURCES = ("n_beams", "n_best", "length_penalty", "truncate", "show_attention")  # flags
OF_OTHERS = ("prompt", "interactive", "stream", "num_samples", "perplexity", "source")  # not for --input
OF_AUTOMATA = ("stop", "regex", "json_schema")
DEFAULT_TEMPERATURE = {False: 0.8, True: 0.0}  # of a text that goes on, and of an answer: greedy, as in transformers


@one_line_errors()
def main(argv: list[str]) -> None:
    """Check all that is asked for, load, generate, print."""
    args = parse(Args, argv, prog="sample.py")
    keep_compiled()
    said = None if args.prompt is None else read_prompt(args.prompt)
    path = find_source(args.model)
    run = is_run(path)
    args = dataclasses.replace(args, step=latest_step(path) if run and args.step is None else args.step)
    source = open_source(path, args.step)
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
        settings = dataclasses.asdict(args) | {
            "model": str(path.resolve()),
            "dtype": writer.model.cfg.dtype,
        }
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


def rules_of(args: Args) -> dict[str, Any]:
    """Those of a Sampler, by name."""
    return {name: getattr(args, name) for name in tx.Sampler._fields if hasattr(args, name)}


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


def translate_lines(args: Args, path: Path, opened: Source) -> None:
    """Print the translation of each line of --source, in their order; an empty line stays empty.

    Several of a line come with its number and their scores, if they have any.
    """
    model, tokenizer, how = prepare_translator(args, path, opened)
    params = opened.load(None if is_run(path) else model.cfg.dtype, None)
    start, count, drawn = time.perf_counter(), 0, args.show_attention is None
    for first, lines in read_lines(cast(str, args.source)):
        full = {number: line for number, line in enumerate(lines, first) if line.strip()}
        key = jax.random.fold_in(jax.random.key(args.seed), first)
        told = tx.translate(model, params, tokenizer, [*full.values()], numbers=[*full], key=key, **how)
        found = dict(zip(full, told, strict=True))
        for number in range(first, first + len(lines)):
            for best in found.get(number, []):
                text = " ".join(best.text.splitlines())  # a line for each
                score = "" if math.isnan(best.score) else f"{best.score:.4f}\t"
                print(text if args.n_best == 1 else f"{number}\t{score}{text}")
            if number not in found:
                print()
        if not drawn and told:
            plot_translation(model, params, tokenizer, told[0][0], how["start_id"], cast(str, args.show_attention))
            drawn = True
        sys.stdout.flush()
        count += len(full)
    say(f"{count} translated in {time.perf_counter() - start:.1f} s, with compilation")


def prepare_translator(args: Args, path: Path, opened: Source) -> tuple[tx.EncoderDecoder, Subwords, dict[str, Any]]:
    """The model without its parameters, its tokenizer, and how they translate: arguments of tx.translate."""
    cfg, tokenizer, said, name = opened.cfg, open_tokenizer(path), opened.special_ids, f"model={args.model!r}"
    for flag in ("prompt", "interactive", "stream", "system", "raw", *OF_AUTOMATA):
        rule = f"--{flag.replace('_', '-')} is for a text that goes on, not for --source"
        require(not getattr(args, flag), f"{rule}; leave one out")
    require(args.num_samples == 1, f"num_samples={args.num_samples} is not for --source; give --n-best")
    require(args.n_best == 1 or args.temperature != 0, f"temperature=0 gives one translation, not n_best={args.n_best}")
    if args.show_attention is not None:
        check_picture(args.show_attention)
    if cfg.stack != "encoder_decoder":
        raise InputError(f"{name} is no encoder_decoder but of kind {cfg.stack}; {OTHERS[cfg.stack]}")
    if not isinstance(tokenizer, Subwords):
        raise InputError(f"{name} has no tokenizer; put its tokenizer.json beside the weights")
    rules = rules_of(args)
    draws = bool(args.temperature) or any(rule is not None for name, rule in rules.items() if name != "temperature")
    heat = 1.0 if args.temperature is None else args.temperature
    start = said.get("decoder_start_token_id", tokenizer.bos_id)
    forced, pad = said.get("forced_bos_token_id"), said.get("pad_token_id")
    ends = end_ids(said, tokenizer)
    how = {
        "n_beams": 1 if args.temperature == 0 else args.n_beams, "n_best": args.n_best,
        "length_penalty": args.length_penalty,
        "sampler": tx.Sampler(**rules)._replace(temperature=heat or None) if draws else None,
        "max_new_tokens": args.max_new_tokens, "truncate": args.truncate,
        "special": "<extra_id_0>" in tokenizer.special_tokens,
        "start_id": start if forced is None else (start, forced), "end_ids": ends,
        "forbidden": () if pad is None or pad in ends else (pad,),
    }  # fmt: skip
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return cast(tx.EncoderDecoder, tx.build(dataclasses.replace(cfg, dtype=fast))), tokenizer, how


if __name__ == "__main__":
    main(sys.argv[1:])
