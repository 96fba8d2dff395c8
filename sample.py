"""Write text with a trained model: `python sample.py runs/gpt-shakespeare --prompt "ROMEO:"`.

Text goes to standard output, speeds to standard error.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

import tx_jax as tx
from tx_jax.checkpoint import read_config, restore_params
from tx_jax.command_line import keep_compiled, one_line_errors, parse
from tx_jax.data.tokenizers import Tokenizer, load_tokenizer
from tx_jax.errors import InputError, require


@dataclasses.dataclass(frozen=True)
class Args:
    """Write text with a trained model."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_DIR")]  # what train.py wrote
    prompt: str | None = None  # text; @FILE reads a file, - reads standard input; None: the run's sample_prompt
    max_new_tokens: int | None = None  # None: 500, or what the context leaves
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together reach p
    min_p: float | None = None  # keep tokens at least p times as likely as the likeliest
    seed: int = 0
    num_samples: int = 1
    stream: bool = False  # print each token as it comes
    step: int | None = None  # of the checkpoint; None: the newest

    def __post_init__(self) -> None:
        n, heat = self.num_samples, self.temperature
        require(n >= 1, f"num_samples={n} must be at least 1; leave it out for one")
        require(n == 1 or not self.stream, f"num_samples={n} cannot be streamed; leave out --stream, or ask for one")
        require(heat >= 0, f"temperature={heat} must not be negative; 0 is greedy")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be from 0 to 2³² − 1")


@one_line_errors()
def main(argv: list[str]) -> None:
    """Load, generate, print."""
    args = parse(Args, argv, prog="sample.py")
    keep_compiled()
    model, params, tokenizer = load(args.run_dir, args.step)
    own = read_config(args.run_dir).train.sample_prompt or "\n"
    prompt = own if args.prompt is None else read_prompt(args.prompt)
    tokens = np.tile(tokenizer.encode(prompt), (args.num_samples, 1))
    room = max(model.cfg.max_len - tokens.shape[1], 1)
    new = min(500, room) if args.max_new_tokens is None else args.max_new_tokens
    sampler = tx.Sampler(args.temperature or None, args.top_k, args.top_p, args.min_p)
    write = stream if args.stream else complete
    write(model, params, tokenizer, prompt, tokens, new, sampler, jax.random.key(args.seed))


def load(run_dir: str, step: int | None) -> tuple[tx.DecoderLM, dict, Tokenizer]:
    """The model of a run directory, its parameters and its tokenizer."""
    cfg = read_config(run_dir).model
    if jax.default_backend() == "cpu":
        cfg = dataclasses.replace(cfg, dtype="float32")  # faster than bfloat16 there
    model = tx.DecoderLM(cfg)
    shapes = jax.eval_shape(lambda key: tx.init_params(model, key), jax.random.key(0))
    return model, restore_params(run_dir, shapes, step), load_tokenizer(Path(run_dir) / "tokenizer")


def read_prompt(prompt: str) -> str:
    """The text that --prompt stands for."""
    try:
        if prompt == "-":
            data = sys.stdin.buffer.read()
        elif prompt.startswith("@"):
            data = Path(prompt[1:]).read_bytes()
        else:
            data = prompt.encode("utf-8", "surrogateescape")
        require(data, f"prompt={prompt!r} is empty; give at least one character")
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"prompt={prompt!r} cannot be read ({error.strerror}); name a file after the @") from error
    except UnicodeDecodeError as error:
        where = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError(f"prompt={prompt!r} is not UTF-8: {where}; convert it, such as by iconv") from error


def complete(model, params, tokenizer, prompt, tokens, new, sampler, key) -> None:
    """Print every sample when all are there. Compiling is not counted in the speeds."""
    padded, n_slots = tx.prepare(model, tokens, None, new, sampler, key, None)
    cache = tx.init_cache(model.cfg, len(tokens), n_slots)
    fill = jax.jit(tx.prefill, static_argnums=0, donate_argnums=3).lower(model, params, padded, cache).compile()
    start = time.perf_counter()
    logits, cache = jax.block_until_ready(fill(params, padded, cache))
    filling = time.perf_counter() - start
    loop = jax.jit(tx.decode, static_argnums=(0, 4), donate_argnums=3)
    run = loop.lower(model, params, logits, cache, new, sampler, key).compile()
    start = time.perf_counter()
    rows = np.asarray(run(params, logits, cache, sampler, key).tokens)
    decoding = time.perf_counter() - start
    for i, row in enumerate(rows):
        if len(rows) > 1:
            print(f"--- sample {i + 1}")
        print(prompt + tokenizer.decode(row))
    say(f"prefill {tokens.size} tokens", tokens.size, filling)
    say(f"decode {rows.size} tokens", rows.size - len(rows), decoding)  # each row's first came from the prefill


def stream(model, params, tokenizer, prompt, tokens, new, sampler, key) -> None:
    """Print each token as it comes. The first two compile, and are not counted in the speed."""
    ids = tx.stream(model, params, tokens, max_new_tokens=new, sampler=sampler, key=key)
    times = [time.perf_counter()]

    def clocked():
        for token in ids:
            times.append(time.perf_counter())
            yield int(token[0])

    print(prompt, end="", flush=True)
    for piece in tokenizer.stream(clocked()):
        print(piece, end="", flush=True)
    print()
    say(f"first token after {times[1] - times[0]:.2f} s, with compilation", 0, 0)
    say(f"decode {new} tokens", new - 2, times[-1] - times[min(2, new)])


def say(what: str, n_tokens: int, seconds: float) -> None:
    """One line for the person, with the speed if there is one."""
    print(what + (f", {n_tokens / seconds:,.0f} tokens/s" if n_tokens > 0 else ""), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
