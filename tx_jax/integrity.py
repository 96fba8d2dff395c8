"""Whether arrays are those that were saved: a sum of their bits, the same on any devices, and what a record says.

A flipped bit in a file of arrays is otherwise read as another number, without a word. Not against an adversary: that
would need a cryptographic hash, which devices do not compute.
"""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32


def sums(tree: PyTree) -> dict[str, str]:
    """By path, each leaf's dtype and shape, and 64 bits that another value of any element changes.

    >>> sums({"w": jnp.zeros(2)})
    {'w': 'float32[2] 28853c1e42299230'}
    """
    return look(tree)[0]


def look(tree: PyTree) -> tuple[dict[str, str], list[str]]:
    """The `sums`, and the paths of leaves that hold a NaN or an infinity.

    Computed where a leaf is, shards and all, in one pass, with nothing as long as it in memory.

    >>> look({"w": jnp.ones(2), "b": jnp.array([1, jnp.nan])})[1]
    ['b']
    """
    told, bad = {}, []
    for name, leaf in leaves(tree).items():
        # One at a time: on CPU, programs of many devices that run at once can wait for each other for ever.
        one, other, flawed = jax.device_get(_look(leaf))
        told[name] = f"{kind(leaf)} {one:08x}{other:08x}"
        bad += [name] if flawed else []
    return told, bad


def leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def kind(leaf: Any) -> str:
    """Its dtype and shape, as in float32[8, 3]."""
    return f"{leaf.dtype}{list(leaf.shape)}"


@jax.jit
def _look(leaf: Array) -> UInt32[Array, "3"]:
    """Two sums, modulo 2³², of a mixture of each element's bits and its place: a bijection of the bits at any place.

    And 1 if an element is not finite.
    """
    finite = jnp.isfinite(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.ones(leaf.shape, bool)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)  # 8 bytes: two words
    strides = np.cumprod((1, *bits.shape[:0:-1]), dtype=np.uint32)[::-1]
    iotas = [jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) for axis in range(bits.ndim)]
    place = functools.reduce(jnp.add, (i * s for i, s in zip(iotas, strides, strict=False)), jnp.uint32(0))
    x = bits ^ (place * jnp.uint32(0x9E3779B1) + jnp.uint32(0x85EBCA77))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the last mixing of MurmurHash3 (Appleby 2011)
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x ^= x >> 16
    flaws = jnp.broadcast_to(jnp.expand_dims(~finite, range(finite.ndim, x.ndim)), x.shape).astype(jnp.uint32)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] | b[2])  # noqa: E731
    zeros, axes = (jnp.uint32(0),) * 3, tuple(range(x.ndim))
    return jnp.stack(jax.lax.reduce((x, x * (2 * place + 1), flaws), zeros, add, axes))  # one pass


_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by the bytes of an element


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the SHA-256 of the rest."""
    return record | {"sha256": _digest(record)}


def is_sealed(record: dict[str, Any]) -> bool:
    """Whether a record is as it was when it was sealed."""
    return record.get("sha256") == _digest({name: value for name, value in record.items() if name != "sha256"})


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
