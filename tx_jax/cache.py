"""The key-value cache: a value that a forward pass takes and gives back, nothing more.

Batch is axis 0 of every leaf, so a beam's reordering, a split or a sharding is one `jax.tree.map`. The keys of an
encoder's output, which cross-attention reads, have the same type.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tx_jax.config import ModelConfig
from tx_jax.errors import require
from tx_jax.ops.int8 import Int8, to_int8

CACHE_DTYPES = ("float32", "bfloat16", "int8")


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    k: Float[Array, "B S K H"] | Int8
    v: Float[Array, "B S K Hv"] | Int8


class Cache(NamedTuple):
    """Keys and values of all layers, and the position that each slot holds (−1: empty)."""

    layers: tuple[LayerCache, ...]
    positions: Int[Array, "B S"]

    def next_positions(self) -> Int[Array, " B"]:
        """Where each row goes on: one past its last position."""
        return self.positions.max(axis=1) + 1


def init_cache(cfg: ModelConfig, batch_size: int, n_slots: int | None = None, dtype: Any = None) -> Cache:
    """An empty cache of `n_slots` tokens a row (None: cfg.max_len), in `dtype` (None: the model's, of computation).

    "int8" keeps each head's keys and values in 8 bits and a scale: half of bfloat16's memory for heads of some width.

    With `cfg.window` in every layer, fewer slots than the text has tokens make a ring: position p lives in slot
    p mod n_slots, but the first cfg.n_sinks stay. Chunks of T tokens need n_slots ≥ cfg.reach + T − 1; without a
    window, n_slots is the longest text.

    >>> init_cache(ModelConfig(), batch_size=2, n_slots=16).positions.shape
    (2, 16)

    Raises:
        InputError: batch_size or n_slots is below 1, or dtype is none of CACHE_DTYPES.
    """
    n_slots = cfg.max_len if n_slots is None else n_slots
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    require(n_slots >= 1, f"n_slots={n_slots} must be at least 1; None gives max_len={cfg.max_len}")
    dtype = cfg.dtype if dtype is None else dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    require(dtype in CACHE_DTYPES, f"dtype={dtype!r} is not one of {', '.join(CACHE_DTYPES)}")

    def empty(width: int) -> Any:
        zeros = jnp.zeros((batch_size, n_slots, cfg.K, width), dtype)
        return Int8(zeros, jnp.zeros(zeros.shape[:-1])) if dtype == "int8" else zeros

    layers = tuple(LayerCache(empty(cfg.H), empty(cfg.Hv)) for _ in range(cfg.n_layers))
    return Cache(layers, jnp.full((batch_size, n_slots), -1, jnp.int32))


def slots_of(positions: Int[Array, "B T"], n_slots: int, n_sinks: int = 0) -> Int[Array, "B T"]:
    """Where each position is written: p mod n_slots, of the slots after n_sinks. Padding (−1) is dropped, out of range.

    >>> slots_of(jnp.array([[-1, 0, 1, 2, 3, 4, 5]]), 4, n_sinks=1).tolist()
    [[4, 0, 1, 2, 3, 1, 2]]
    """
    ring = n_sinks + (positions - n_sinks) % max(n_slots - n_sinks, 1)
    return jnp.where(positions < 0, n_slots, jnp.where(positions < n_sinks, positions, ring))


def write(store: Any, new: Any, slots: Int[Array, "B T"]) -> Any:
    """`store` (B, S, …) with `new` (B, T, …) at its slots; what is out of range is dropped, never clamped."""
    if isinstance(store, Int8) and not isinstance(new, Int8):
        new = to_int8(new)

    def placed(row: Array, values: Array, index: Array) -> Array:
        return row.at[index].set(values.astype(row.dtype), mode="drop")

    return jax.tree.map(lambda leaf, values: jax.vmap(placed)(leaf, values, slots), store, new)


def resize_cache(cache: Cache, n_slots: int, batch_size: int | None = None, n_sinks: int = 0) -> Cache:
    """The same keys and values in n_slots slots; each row serves batch_size / rows rows in turn (None: one).

    With fewer slots than a row holds tokens, the first n_sinks (those of the model's config) and the last remain.

    >>> resize_cache(init_cache(ModelConfig(), 1, 16), 40, batch_size=3).positions.shape
    (3, 40)
    """
    B = len(cache.positions)
    n_each = 1 if batch_size is None else batch_size // B
    require(batch_size in (None, n_each * B), f"batch_size={batch_size} must be a multiple of the cache's {B} rows")
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, n_each, axis=0), cache)
    new = cache.positions >= cache.next_positions()[:, None] - (n_slots - n_sinks)
    kept = jnp.where(new | (cache.positions < n_sinks), cache.positions, -1)
    slots = slots_of(kept, n_slots, n_sinks)

    def moved(leaf: Array, fill: int) -> Array:
        return write(jnp.full((len(leaf), n_slots, *leaf.shape[2:]), fill, leaf.dtype), leaf, slots)

    layers = jax.tree.map(lambda leaf: moved(leaf, 0), cache.layers)
    return Cache(layers, moved(kept, -1))


def to_reading_order(memory: Cache | None) -> Any:
    """A memory laid out once so that a loop's steps read it in order; `from_reading_order` is its way back.

    XLA on CPU transposes the keys (B, S, K, H) to (B, K, H, S) and the values to (B, K, S, H) for its products, in each
    step of a loop. In what has this layout already the two transpositions cancel, and no step copies anything; the
    barrier keeps XLA from moving one of them out of the loop. A step over 1,000 tokens of 32 sources takes a quarter of
    the time, or less (benchmarks/RESULTS.md).
    """
    if memory is None:
        return None
    floats: Any = memory.layers  # an encoder's output is never in 8 bits
    return tuple((k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)) for k, v in floats), memory.positions


def from_reading_order(laid: Any) -> Cache | None:
    """The memory that `to_reading_order` laid out."""
    if laid is None:
        return None
    layers, positions = jax.lax.optimization_barrier(laid)
    return Cache(tuple(LayerCache(k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)) for k, v in layers), positions)
