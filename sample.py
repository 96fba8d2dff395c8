"""Write text with a trained model: `python sample.py runs/gpt-shakespeare --prompt "ROMEO:"`.

Text goes to standard output, speeds to standard error.
"""

import dataclasses
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

import tx_jax as tx
from tx_jax.checkpoint import read_config, restore_params
from tx_jax.command_line import keep_compiled, one_line_errors
from tx_jax.data.tokenizers import Tokenizer, load_tokenizer
from tx_jax.decoding.generate import prepare
from tx_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Args:
    """Write text with a trained model."""

    run_dir: tyro.conf.Positional[str]  # what train.py wrote
    prompt: str = "\n"  # text; @FILE reads a file, - reads standard input
    max_new_tokens: int | None = None  # None: 500, or what the context leaves
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together reach p
    min_p: float | None = None  # keep tokens at least p times as likely as the likeliest
    seed: int = 0
    num_samples: int = 1
    stream: bool = False  # print each token as it comes
    step: int | None = None  # of the checkpoint; None: the newest


def main(args: Args) -> None:
    """Load, generate, print."""
    require(args.num_samples >= 1, f"num_samples={args.num_samples} must be at least 1")
    require(args.num_samples == 1 or not args.stream, f"num_samples={args.num_samples} cannot be streamed; it shows one")
    require(args.temperature >= 0, f"temperature={args.temperature} must not be negative; 0 is greedy")
    model, params, tokenizer = load(args.run_dir, args.step)
    prompt = read_prompt(args.prompt)
    tokens = np.tile(tokenizer.encode(prompt), (args.num_samples, 1))
    room = max(model.cfg.max_len - tokens.shape[1], 1)
    new = min(500, room) if args.max_new_tokens is None else args.max_new_tokens
    sampler = tx.Sampler(args.temperature or None, args.top_k, args.top_p, args.min_p)
    write = stream if args.stream else complete
    write(model, params, tokenizer, prompt, tokens, new, sampler, jax.random.key(args.seed))


def complete(model, params, tokenizer, prompt, tokens, new, sampler, key) -> None:
    """Print every sample when all are there. Compiling is not counted in the speeds."""
    padded, n_slots = prepare(model, tokens, None, new, sampler, key, None)
    cache = tx.init_cache(model.cfg, len(tokens), n_slots)
    fill = jax.jit(tx.prefill, static_argnums=0, donate_argnums=3).lower(model, params, padded, cache).compile()
    start = time.perf_counter()
    logits, cache = jax.block_until_ready(fill(params, padded, cache))
    filled = time.perf_counter()
    loop = jax.jit(tx.decode, static_argnums=(0, 4), donate_argnums=3)
    run = loop.lower(model, params, logits, cache, new, sampler, key).compile()
    begun = time.perf_counter()
    rows = np.asarray(run(params, logits, cache, sampler, key).tokens)
    ended = time.perf_counter()
    for i, row in enumerate(rows):
        print(f"--- sample {i + 1}") if len(rows) > 1 else None
        print(prompt + tokenizer.decode(row))
    speeds(tokens.size, filled - start, rows.size - len(rows), ended - begun)


def stream(model, params, tokenizer, prompt, tokens, new, sampler, key) -> None:
    """Print each token as it comes. The first two compile, and are not counted in the speed."""
    times = []

    def ids():
        for token in tx.stream(model, params, tokens, max_new_tokens=new, sampler=sampler, key=key):
            times.append(time.perf_counter())
            yield int(token[0])

    start = time.perf_counter()
    print(prompt, end="", flush=True)
    for piece in tokenizer.stream(ids()):
        print(piece, end="", flush=True)
    print()
    print(f"first token after {times[0] - start:.2f} s, with compilation", file=sys.stderr)
    if len(times) > 2:
        print(f"decode {(len(times) - 2) / (times[-1] - times[1]):,.0f} tokens/s", file=sys.stderr)


def speeds(prompt_tokens: int, prefill_s: float, new_tokens: int, decode_s: float) -> None:
    """One line for each half. The first new token is the prefill's."""
    print(f"prefill {prompt_tokens} tokens, {prompt_tokens / prefill_s:,.0f} tokens/s", file=sys.stderr)
    if new_tokens:
        print(f"decode {new_tokens} tokens, {new_tokens / decode_s:,.0f} tokens/s", file=sys.stderr)


def read_prompt(prompt: str) -> str:
    """The text that --prompt stands for."""
    if prompt == "-":
        prompt = sys.stdin.buffer.read()
    elif prompt.startswith("@"):
        prompt = Path(prompt[1:]).read_bytes()
    else:
        require(prompt, "prompt='' is empty; give at least one character")
        return prompt
    require(prompt, "the prompt is empty; give at least one character")
    try:
        return prompt.decode("utf-8")
    except UnicodeDecodeError as error:
        raise tx.InputError(f"the prompt is not UTF-8: byte 0x{prompt[error.start]:02x} at offset {error.start}") from error


def load(run_dir: str, step: int | None) -> tuple[tx.DecoderLM, dict, Tokenizer]:
    """The model of a run directory, its parameters and its tokenizer."""
    cfg = read_config(run_dir).model
    if jax.default_backend() == "cpu":
        cfg = dataclasses.replace(cfg, dtype="float32")  # faster than bfloat16 there
    model = tx.build(cfg)
    shapes = jax.eval_shape(lambda key: tx.init_params(model, key), jax.random.key(0))
    return model, restore_params(run_dir, shapes, step), load_tokenizer(Path(run_dir) / "tokenizer")


if __name__ == "__main__":
    with one_line_errors():
        keep_compiled()
        main(tyro.cli(Args))
