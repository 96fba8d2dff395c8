"""The key-value cache: a value that a forward pass takes and gives back, nothing more.

Batch is axis 0 of every leaf, so a beam's reordering, a split or a sharding is one `jax.tree.map`. The keys of an
encoder's output, which cross-attention reads, have the same type.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tx_jax.config import ModelConfig
from tx_jax.errors import require
from tx_jax.ops.int8 import Int8, to_int8

CACHE_DTYPES = ("float32", "bfloat16", "int8")


class LayerCache(NamedTuple):
    """Keys and values of one layer, as attention's two products read them: in another order, XLA on CPU would copy all
    of a cache at each step.

    >>> init_cache(ModelConfig(n_heads=8, d_model=256), batch_size=2, n_slots=16).layers[0].k.shape
    (2, 8, 32, 16)
    """

    k: Float[Array, "B K H S"] | Int8
    v: Float[Array, "B K S Hv"] | Int8


SLOTS, WIDTH = (3, 2), (2, 3)  # which axis of k and of v is that of the slots, and of a head's numbers


class Cache(NamedTuple):
    """Keys and values of all layers, and the position that each slot holds (−1: empty).

    >>> Cache(layers=(), positions=jnp.array([[0, 1, 2, -1], [0, -1, -1, -1]])).next_positions().tolist()
    [3, 1]
    """

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
    window, n_slots is the longest text: a loop of yours that goes on inside jit would lose its first tokens unseen.

    >>> init_cache(ModelConfig(), batch_size=2, n_slots=16).positions.shape
    (2, 16)

    Raises:
        InputError: batch_size or n_slots is below 1, or dtype is none of CACHE_DTYPES.
    Source: sinks and their ring: Xiao et al. 2023 (StreamingLLM), §3.2.
    """
    n_slots = cfg.max_len if n_slots is None else n_slots
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    require(n_slots >= 1, f"n_slots={n_slots} must be at least 1; None gives max_len={cfg.max_len}")
    dtype = cfg.dtype if dtype is None else dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    require(dtype in CACHE_DTYPES, f"dtype={dtype!r} is not one of {', '.join(CACHE_DTYPES)}")

    def empty() -> LayerCache:
        shapes = (batch_size, cfg.K, cfg.H, n_slots), (batch_size, cfg.K, n_slots, cfg.Hv)
        zeros = (jnp.zeros(shape, "float32" if dtype == "int8" else dtype) for shape in shapes)
        return LayerCache(*(map(to_int8, zeros, WIDTH) if dtype == "int8" else zeros))

    layers = tuple(empty() for _ in range(cfg.n_layers))
    return Cache(layers, jnp.full((batch_size, n_slots), -1, jnp.int32))


def slots_of(positions: Int[Array, "B T"], n_slots: int, n_sinks: int = 0) -> Int[Array, "B T"]:
    """Where each position is written: p mod n_slots, of the slots after n_sinks. Padding (−1) is dropped, out of range.

    >>> slots_of(jnp.array([[-1, 0, 1, 2, 3, 4, 5]]), 4, n_sinks=1).tolist()
    [[4, 0, 1, 2, 3, 1, 2]]
    """
    ring = n_sinks + (positions - n_sinks) % max(n_slots - n_sinks, 1)
    return jnp.where(positions < 0, n_slots, jnp.where(positions < n_sinks, positions, ring))


def write(store: Array, new: Array, slots: Int[Array, "B T"], axis: int = 1) -> Array:
    """`store` with T things of `new` at its slots along `axis`; what is out of range is dropped, never clamped."""
    before = (slice(None),) * (axis - 1)
    if slots.size == 1:  # and another, which is dropped: of a single one XLA on CPU makes copies of all of `store`
        new, slots = jnp.repeat(new, 2, axis), jnp.pad(slots, ((0, 0), (0, 1)), constant_values=store.shape[axis])

    def placed(row: Array, values: Array, index: Array) -> Array:
        return row.at[(*before, index)].set(values.astype(row.dtype), mode="drop")

    return jax.vmap(placed)(store, new, slots)


def write_layer(cache: LayerCache, new: LayerCache, slots: Int[Array, "B T"]) -> LayerCache:
    """The cache with T new keys and values at its slots, in 8 bits if it is."""
    if isinstance(cache.k, Int8) and not isinstance(new.k, Int8):
        floats: Any = new
        new = LayerCache(*map(to_int8, floats, WIDTH))

    def placed(leaves: Any, values: Any, axis: int) -> Any:
        return jax.tree.map(lambda leaf, value: write(leaf, value, slots, axis), leaves, values)

    return LayerCache(*map(placed, cache, new, SLOTS))


def by_slots(function: Callable[[Array, int], Array], cache: Cache) -> Cache:
    """function(leaf, axis) of every leaf, where axis is that of its slots."""

    def each(part: Any, axis: int) -> Any:
        return jax.tree.map(lambda leaf: function(leaf, axis), part)

    layers = tuple(LayerCache(*map(each, layer, SLOTS)) for layer in cache.layers)
    return Cache(layers, function(cache.positions, 1))


def resize_cache(cache: Cache, n_slots: int, batch_size: int | None = None, n_sinks: int = 0) -> Cache:
    """The same keys and values in n_slots slots; each row serves batch_size / rows rows in turn (None: one).

    With fewer slots than a row holds tokens, the first n_sinks (those of the model's config) and the last remain.

    >>> resize_cache(init_cache(ModelConfig(), 1, 16), 40, batch_size=3).positions.shape
    (3, 40)

    Raises:
        InputError: n_slots is below 1, or batch_size is no multiple of the cache's rows.
    """
    B = len(cache.positions)
    n_each = 1 if batch_size is None else batch_size // B
    require(n_slots >= 1, f"n_slots={n_slots} must be at least 1")
    require(batch_size in (None, n_each * B), f"batch_size={batch_size} must be a multiple of the cache's {B} rows")
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, n_each, axis=0), cache)
    new = cache.positions >= cache.next_positions()[:, None] - (n_slots - n_sinks)
    kept = jnp.where(new | (cache.positions < n_sinks), cache.positions, -1)
    slots = slots_of(kept, n_slots, n_sinks)

    empty = by_slots(
        lambda leaf, axis: jnp.zeros_like(leaf, shape=(*leaf.shape[:axis], n_slots, *leaf.shape[axis + 1 :])), cache
    )
    layers = tuple(write_layer(old, new, slots) for old, new in zip(empty.layers, cache.layers, strict=True))
    return Cache(layers, write(empty.positions - 1, kept, slots))
