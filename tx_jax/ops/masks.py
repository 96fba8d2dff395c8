"""Who may attend to whom, as a description rather than an array.

A `Mask` holds positions and segments, which grow with T, and the rules between them. Attention bodies read the
description; only the plain one materialises the (B, T, S) array. One convention carries padding, empty cache
slots and source padding alike: **a position is an integer ≥ 0, and −1 means that there is no token here**.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_positions", "k_positions", "q_segments", "k_segments", "prefix"],
    meta_fields=["causal", "window", "n_sinks"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The conjunction of every rule that is set. True means "may attend".

    Positions of None are 0, 1, 2, …: with no other rule, a body may then use its own causal form.

    >>> Mask(causal=True).materialize(2, 2)[0].tolist()
    [[True, False], [True, True]]
    """

    causal: bool = False  # a key at or before the query
    window: int | None = None  # at most this many keys back, the query's own included; when not causal, also ahead
    n_sinks: int = 0  # keys at positions below this are in every window
    q_positions: Int[Array, "#B T"] | None = None
    k_positions: Int[Array, "#B S"] | None = None  # −1: no key here
    q_segments: Int[Array, "#B T"] | None = None  # packed documents: only the same number sees each other
    k_segments: Int[Array, "#B S"] | None = None
    prefix: Int[Array, " B"] | None = None  # prefix-LM: keys at positions below this are seen by every query

    def materialize(self, q_len: int, k_len: int) -> Bool[Array, "b T S"]:
        """The mask as an array of (B or 1, q_len, k_len)."""
        q = jnp.arange(q_len)[None] if self.q_positions is None else self.q_positions
        k = jnp.arange(k_len)[None] if self.k_positions is None else self.k_positions
        q, k = q[:, :, None], k[:, None, :]
        seen = jnp.ones_like(q == k)
        if self.causal:
            seen = k <= q
        if self.window is not None:
            seen &= (jnp.abs(q - k) < self.window) | (k < self.n_sinks)
        if self.prefix is not None:
            seen |= (k < self.prefix[:, None, None]) & (q >= 0)
        if self.q_segments is not None and self.k_segments is not None:
            seen &= self.q_segments[:, :, None] == self.k_segments[:, None, :]
        return seen & (k >= 0)

    def n_keys(self, q_len: int, k_len: int) -> Int[Array, ""]:
        """How many keys from the first on hold all that a query may see; windows and segments are not looked at."""
        k = jnp.arange(k_len)[None] if self.k_positions is None else self.k_positions
        seen = k >= 0
        if self.causal:
            q = jnp.full(1, q_len - 1) if self.q_positions is None else self.q_positions.max(axis=1)
            last = q if self.prefix is None else jnp.maximum(q, self.prefix - 1)
            seen &= k <= last[:, None]
        return jnp.where(seen.any(axis=0), jnp.arange(1, k_len + 1), 0).max()

    def reach(self, start: int, stop: int, k_len: int) -> tuple[int, int]:
        """The first and the last + 1 of k_len keys that the queries start:stop may see, as far as order alone says."""
        if self.q_positions is not None or self.k_positions is not None or self.prefix is not None:
            return 0, k_len
        window = k_len + stop if self.window is None or self.n_sinks else self.window
        last = min(k_len, stop if self.causal else stop + window - 1)
        return max(0, min(start - window + 1, last - 1)), last

    def rows(self, start: Int[Array, ""] | int, n: int, q_len: int) -> "Mask":
        """The description for n of q_len queries, from `start`, which may be traced, on."""
        q = jnp.arange(q_len)[None] if self.q_positions is None else self.q_positions
        return dataclasses.replace(self, q_positions=_part(q, start, n), q_segments=_part(self.q_segments, start, n))

    def columns(self, start: Int[Array, ""] | int, n: int, k_len: int) -> "Mask":
        """The description for n of k_len keys, from `start`, which may be traced, on."""
        k = jnp.arange(k_len)[None] if self.k_positions is None else self.k_positions
        return dataclasses.replace(self, k_positions=_part(k, start, n), k_segments=_part(self.k_segments, start, n))


def _part(x: Array | None, start: Any, n: int) -> Array | None:
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, n, axis=1)
