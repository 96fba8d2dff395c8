"""sample.py's translations: a line out for each line of --source, in their order."""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any, cast

import jax

from tx_jax.convert.pretrained import Source
from tx_jax.convert.sources import end_ids, is_run, open_tokenizer
from tx_jax.data.subwords import Subwords
from tx_jax.decoding.samplers import Sampler
from tx_jax.errors import InputError, require
from tx_jax.inspect.plots import check_picture, plot_translation
from tx_jax.models import EncoderDecoder, build
from tx_jax.sample_args import OF_AUTOMATA, OTHERS, Args, rules_of
from tx_jax.translate import translate
from tx_jax.writing import read_lines, say


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
        told = translate(model, params, tokenizer, [*full.values()], numbers=[*full], key=key, **how)
        found = dict(zip(full, told, strict=True))
        for number in range(first, first + len(lines)):
            for best in found.get(number, []):
                text = " ".join(best.text.splitlines())  # a line for each
                score = "" if math.isnan(best.score) else f"{best.score:.4f}\t"
                print(text if args.n_best == 1 else f"{number}\t{score}{text}")
            if number not in found:
                print()
        if not drawn and told:
            picture = plot_translation(model, params, tokenizer, told[0][0], how["start_id"])
            picture.savefig(cast(str, args.show_attention), dpi=150)
            drawn = True
        sys.stdout.flush()
        count += len(full)
    say(f"{count} translated in {time.perf_counter() - start:.1f} s, with compilation")


def prepare_translator(args: Args, path: Path, opened: Source) -> tuple[EncoderDecoder, Subwords, dict[str, Any]]:
    """The model without its parameters, its tokenizer, and how they translate: arguments of translate."""
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
        "sampler": Sampler(**rules)._replace(temperature=heat or None) if draws else None,
        "max_new_tokens": args.max_new_tokens, "truncate": args.truncate,
        "special": "<extra_id_0>" in tokenizer.special_tokens,
        "start_id": start if forced is None else (start, forced), "end_ids": ends,
        "forbidden": () if pad is None or pad in ends else (pad,),
    }  # fmt: skip
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return cast(EncoderDecoder, build(dataclasses.replace(cfg, dtype=fast))), tokenizer, how
