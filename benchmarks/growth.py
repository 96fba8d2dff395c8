"""Time and memory of one more token against the length of the context, with the cache and without it.

    python benchmarks/growth.py            # 6 layers, d 384, random weights, float32; draws figures/growth.svg

With the cache, a token takes a + b · context: b is compared with the keys and values of one position over the speed at
which memory is copied. Without it, all of the text is read again for each token: c₁ · context + c₂ · context². Peak
memory is XLA's of the compiled loop (arguments + temporaries + results − aliased), beside weights + cache.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import tx_jax as tx
from tx_jax.complexity.costs import n_bytes
from tx_jax.complexity.measure import clocked, make_read_again, medians
from tx_jax.memory import memory_of


@dataclasses.dataclass
class Args:
    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096)  # tokens before the new ones
    d_model: int = 384
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 6
    vocab_size: int = 8000
    steps: int = 32  # new tokens with the cache: what is timed is their mean
    rounds: int = 5  # of all contexts in turn, after one that warms up; a third of them without the cache
    out: Path = Path("figures/growth.svg")


def make(args: Args) -> tuple[Any, dict]:
    """A LLaMA of these sizes, and its random weights."""
    cfg = tx.ModelConfig(
        vocab_size=args.vocab_size, max_len=max(args.contexts) + args.steps, d_model=args.d_model,
        n_layers=args.n_layers, n_heads=args.n_heads, n_kv_heads=args.n_kv_heads,
        positions="rotary", mlp="swiglu", norm="rmsnorm", tie_head=True,
    )  # fmt: skip
    model = tx.build(cfg)
    return model, tx.init_params(model, jax.random.key(0))


def cached(args: Args, model: Any, params: dict, n: int) -> tuple[Callable[[], float], Any, int]:
    """A function that gives the seconds of a token after n others; the compiled loop, and the bytes of its cache."""
    tokens = jax.random.randint(jax.random.key(1), (1, n), 0, args.vocab_size)
    prompt = tx.Prompt(tokens, jnp.arange(n)[None])
    cache = tx.init_cache(model.cfg, 1, n + args.steps)
    logits, filled = jax.jit(tx.prefill, static_argnums=0)(model, params, prompt, cache)
    loop = jax.jit(tx.decode, static_argnums=(0, 4), donate_argnums=3)
    compiled = loop.lower(model, params, logits, filled, args.steps + 1).compile()

    def once() -> float:
        mine = jax.block_until_ready(jax.tree.map(jnp.copy, filled))  # the loop takes it away
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, logits, mine).tokens)
        return (time.perf_counter() - start) / args.steps

    return once, compiled, n_bytes(cache)


def uncached(args: Args, model: Any, params: dict, n: int) -> Callable[[], float]:
    """A function that gives the seconds of reading n tokens for the logits after the last: a token without a cache."""
    tokens = jax.random.randint(jax.random.key(1), (1, n), 0, args.vocab_size)
    return clocked(jax.jit(make_read_again(model)), params, tokens)


def copy_speed() -> Callable[[], float]:
    """A function that gives the bytes/s that are read and written when 256 MiB are copied, by one core."""
    there = np.ones(64 << 20, np.float32)
    here = np.zeros_like(there)

    def once() -> float:
        start = time.perf_counter()
        np.copyto(here, there)
        return 2 * there.nbytes / (time.perf_counter() - start)

    return once


def fit(contexts: np.ndarray, seconds: np.ndarray, powers: tuple[int, ...]) -> np.ndarray:
    """The coefficients of these powers of the context, by least squares of relative errors, and none below 0."""
    columns = np.stack([contexts.astype(float) ** power for power in powers], axis=1) / seconds[:, None]
    found = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)[0]
    return np.maximum(found, 0)


def exponents(contexts: np.ndarray, seconds: np.ndarray) -> str:
    """By how much the logarithm of the time grows with that of the context, from each context to the next."""
    slopes = np.diff(np.log(seconds)) / np.diff(np.log(contexts))
    return ", ".join(f"{slope:.2f}" for slope in slopes)


def plot(contexts: np.ndarray, times: dict[str, np.ndarray], fits: dict[str, np.ndarray], path: Path) -> None:
    """Draw measured times as points and what was fitted as lines; the same figures give the same file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for (name, seconds), colour in zip(times.items(), ("#5796c8", "#d9973f"), strict=True):
        axes.loglog(contexts, seconds * 1e3, "o", color=colour, label=name)
        axes.loglog(contexts, fits[name] * 1e3, "-", color=colour, alpha=0.6)
    axes.set(xlabel="context, tokens", ylabel="time of a new token, ms")
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def main(args: Args) -> None:
    """Measure, fit, print and draw."""
    model, params = make(args)
    contexts, K, cfg = np.array(args.contexts), args.n_kv_heads, model.cfg
    kept = {n: cached(args, model, params, n) for n in args.contexts}
    *found, copied = medians([*(run for run, _, _ in kept.values()), copy_speed()], args.rounds)
    again = [uncached(args, model, params, n) for n in args.contexts]
    with_cache, without = np.array(found), np.array(medians(again, math.ceil(args.rounds / 3)))

    print("context  with cache, ms  without, ms  peak memory, MiB  weights + cache, MiB  ratio")
    for (n, (_, compiled, held)), token, whole in zip(kept.items(), with_cache, without, strict=True):
        predicted, real = n_bytes(params) + held, memory_of(compiled)
        near = "within 10 %" if abs(real / predicted - 1) <= 0.1 else "NOT within 10 %"
        times = f"{n:7}  {token * 1e3:14.2f}  {whole * 1e3:11.1f}"
        print(f"{times}  {real / 2**20:16.1f}  {predicted / 2**20:20.1f}  {real / predicted:5.3f} {near}")

    a, b = fit(contexts, with_cache, (0, 1))
    c1, c2 = fit(contexts, without, (1, 2))
    one = cfg.n_layers * K * (cfg.H + cfg.Hv) * jnp.dtype(cfg.dtype).itemsize
    bound = one / copied
    print(f"with the cache: {a * 1e3:.2f} ms + {b * 1e9:.0f} ns · context; exponents {exponents(contexts, with_cache)}")
    print(f"  keys and values of a position, {one:,} bytes, at {copied / 1e9:.1f} GB/s (copying): ", end="")
    print(f"{bound * 1e9:.0f} ns; {b / bound:.2f} × as long was measured")
    print(f"without: {c1 * 1e6:.1f} µs · context + {c2 * 1e9:.2f} ns · context²; ", end="")
    print(f"exponents {exponents(contexts, without)}; at {contexts[-1]:,} tokens the square is ", end="")
    print(f"{c2 * contexts[-1] / (c1 + c2 * contexts[-1]):.0%} of the time")
    times = {"with the cache": with_cache, "without: all is read again": without}
    lines = (a + b * contexts, c1 * contexts + c2 * contexts**2.0)
    plot(contexts, times, dict(zip(times, lines, strict=True)), args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
