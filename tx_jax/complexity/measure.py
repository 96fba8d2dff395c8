"""Growth as this machine shows it: time and memory against tokens and width, beside what the formulas say."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tx_jax.cache import init_cache
from tx_jax.complexity.costs import Parts, complexity, total
from tx_jax.config import ModelConfig
from tx_jax.inspect.plots import figure_of
from tx_jax.models import build, init_params
from tx_jax.modules.mlp import MLP
from tx_jax.ops.attention import attention
from tx_jax.ops.masks import Mask
from tx_jax.training.peaks import Device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (1024, 2048, 4096, 8192, 16384)  # tokens: enough for scores to outweigh kernels, in a minute on a CPU
WIDTH, D_HEAD = 64, 32
MLP_WIDTH = 512  # of the feed-forward at these lengths: enough for products to outweigh what they read
WIDTHS, ROWS = (128, 256, 512, 1024), 512  # of the feed-forward for so many tokens


class Curve(NamedTuple):
    """What was measured of one thing at growing sizes, and what the formulas say."""

    name: str
    size: str  # what grows: tokens, width
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    n_bytes: tuple[int, ...]  # temporaries of the compiled program
    flops: tuple[int, ...]  # predicted

    @property
    def exponent(self) -> float:
        """By which power the time grows, over the upper half of the sizes."""
        return _slope(self.sizes, self.seconds)

    @property
    def predicted(self) -> float:
        """By which power the FLOPs grow there."""
        return _slope(self.sizes, self.flops)


def _slope(sizes: tuple[int, ...], values: tuple[float | int, ...]) -> float:
    upper = slice(len(sizes) // 2, None)
    return float(np.polyfit(np.log(sizes[upper]), np.log(values[upper]), 1)[0])


class Case(NamedTuple):
    """One point of a curve: a function to compile, what it reads, and its predicted FLOPs."""

    name: str
    size: str
    n: int
    function: Callable
    args: tuple
    flops: int


def measure(
    cfg: ModelConfig, lengths: tuple[int, ...] = LENGTHS, widths: tuple[int, ...] = WIDTHS, rounds: int = 5
) -> list[Curve]:
    """Curves of one block of cfg's kind, of small width: attention, feed-forward, and the next token's time.

    All points are timed in turn, `rounds` times after one that warms up; a point is the median.
    """
    cases = [case for n in lengths for case in (*_at_length(cfg, n), _feed_forward(cfg, "tokens", n, n, MLP_WIDTH))]
    cases += [_feed_forward(cfg, "width", d, ROWS, d) for d in widths]
    programs = [jax.jit(case.function).lower(*case.args).compile() for case in cases]
    seconds = medians([clocked(program, *case.args) for program, case in zip(programs, cases, strict=True)], rounds)
    points: dict[tuple[str, str], list[tuple]] = {}
    for case, program, found in zip(cases, programs, seconds, strict=True):
        memory: Any = program.memory_analysis()
        points.setdefault((case.name, case.size), []).append((case.n, found, memory.temp_size_in_bytes, case.flops))
    return [Curve(*key, *zip(*rows, strict=True)) for key, rows in points.items()]


def clocked(function: Callable, *args: Any) -> Callable[[], float]:
    """A call as a function that gives its seconds."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        return time.perf_counter() - start

    return once


def medians(runs: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """Of what each gives, all called in turn, and once more before that to warm up."""
    found = [[run() for run in runs] for _ in range(rounds + 1)]
    return [statistics.median(values) for values in zip(*found[1:], strict=True)]


def make_read_again(model: Any) -> Callable[[dict, Any], Any]:
    """(params, tokens) → the logits of the last token, of all that is computed again."""

    def read_again(params: dict, tokens: Any) -> Any:
        hidden, _ = model.apply({"params": params}, tokens, method="hidden")
        return model.apply({"params": params}, hidden[:, -1], method="logits")

    return read_again


def _small(cfg: ModelConfig, max_len: int, d_model: int = WIDTH) -> ModelConfig:
    """One block of the same kind."""
    return dataclasses.replace(
        cfg, stack="decoder", n_encoder_layers=None, pooler=False, n_layers=1, vocab_size=1000, max_len=max_len,
        d_model=d_model, d_mlp=None, d_value=None, d_head=D_HEAD, n_heads=d_model // D_HEAD,
        n_kv_heads=None if cfg.n_heads == cfg.K else 1, n_experts=None, window=None, n_sinks=0, mup_base_width=None,
    )  # fmt: skip


def _at_length(cfg: ModelConfig, n: int) -> list[Case]:
    cfg = _small(cfg, n)
    model, found, key = build(cfg), complexity(cfg, 1, n), jax.random.key(0)
    params = init_params(model, key)
    tokens = jnp.zeros((1, n), jnp.int32)
    cache = init_cache(cfg, 1, n)._replace(positions=jnp.arange(-1, n - 1).at[0].set(n - 2)[None])
    q = jnp.ones((1, n, cfg.n_heads, cfg.H), cfg.dtype)

    def attend(q: Any, k: Any) -> Any:
        return attention(q, k, k, Mask(causal=True))

    read_again = make_read_again(model)

    def next_token(params: Any, token: Any, cache: Any) -> Any:
        return model.apply({"params": params}, token, cache=cache)

    return [
        Case("attention", "tokens", n, attend, (q, q[:, :, : cfg.K]), found.forward["attention scores"].flops),
        Case("next token, cached", "tokens", n, next_token, (params, tokens[:, :1], cache), _flops(found.decode)),
        Case("next token, without cache", "tokens", n, read_again, (params, tokens), _flops(found.decode_again)),
    ]


def _feed_forward(cfg: ModelConfig, size: str, n: int, T: int, d_model: int) -> Case:
    """Of T tokens."""
    cfg = _small(cfg, T, d_model)
    params = init_params(build(cfg), jax.random.key(0))["stack"]["blocks_0"]["mlp"]
    work = complexity(cfg, 1, T).forward["feed-forward"]

    def feed(params: Any, x: Any) -> Any:
        return MLP(cfg).apply({"params": params}, x)

    return Case("feed-forward", size, n, feed, (params, jnp.ones((1, T, d_model), cfg.dtype)), work.flops)


def _flops(parts: Parts | None) -> int:
    return 0 if parts is None else total(parts).flops


def report(curves: list[Curve]) -> str:
    """A line for each curve."""
    rows = [
        f"{curve.name + ' in ' + curve.size:<36} measured {curve.exponent:4.2f}   FLOPs {curve.predicted:4.2f}   "
        f"({curve.sizes[0]:,} … {curve.sizes[-1]:,}: {curve.seconds[0] * 1e3:,.2f} … {curve.seconds[-1] * 1e3:,.1f} ms)"
        for curve in curves
    ]
    return "\n".join(["exponents of growth, over the upper half of each range:", *rows])


def plot(curves: list[Curve], device: Device) -> "Figure":
    """Times and memory on logarithmic axes, each time beside its FLOPs at the device's speed (dashed)."""
    figure, (panels,) = figure_of(13, 4, 1, 3)
    for curve in curves:
        axes = panels[0 if curve.size == "tokens" else 1]
        label = f"{curve.name}: {curve.exponent:.2f}, FLOPs {curve.predicted:.2f}"
        (line,) = axes.plot(curve.sizes, curve.seconds, "o-", label=label)
        axes.plot(curve.sizes, [n / device.flops for n in curve.flops], "--", color=line.get_color(), alpha=0.6)
        if curve.size == "tokens":
            panels[2].plot(curve.sizes, [max(n, 1) for n in curve.n_bytes], "o-", label=curve.name)
    labels = ("tokens", "seconds"), ("width d", "seconds"), ("tokens", "bytes in between")
    for axes, (x, y) in zip(panels, labels, strict=True):
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        sizes = next(curve.sizes for curve in curves if x.startswith(curve.size))
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
