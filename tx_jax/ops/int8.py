"""Weights, keys and values in 8 bits: a quarter of the memory of float32, half of that of bfloat16.

A row is whole numbers from −127 to 127 and one scale, its largest magnitude / 127; what is lost is at most half a scale
in each place. `Int8` is a pytree that stands where an array stood: in a parameter tree (`quantize`), in a cache
(`init_cache(…, dtype="int8")`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from tx_jax.errors import require

MATRICES = ("/kernel", "embed/table")  # how the paths of a model's matrices end; (out, in)
FLOATS = "router/kernel"  # of few numbers, which decide rather than add up


class Int8(NamedTuple):
    """Whole numbers and their scale, which has the same axes and length 1 along that of a row.

    >>> Int8(jnp.array([[127, -3]], jnp.int8), scale=jnp.array([[0.5]])).astype("float32").tolist()
    [[63.5, -1.5]]
    """

    values: Int[Array, "..."]
    scale: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.values.shape

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The array that this stands for."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def to_int8(x: Float[Array, "..."], axis: int = -1) -> Int8:
    """x, each row along `axis` to the nearest of 255 values.

    >>> to_int8(jnp.array([[127.0, -3.4]])).values.tolist()
    [[127, -3]]
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis, keepdims=True) / 127
    return Int8(jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


def int8_product(x: Float[Array, "R I"], w: Int8, dtype: Any) -> Float[Array, "R O"]:
    """x Wᵀ, given in `dtype`; its gradient is that of the floats, with w as a constant."""
    body = _of_wholes if jax.default_backend() == "cpu" else _of_floats
    return _with_gradient(x, w, dtype, body)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _with_gradient(x, w, dtype, body):
    return body(x, w).astype(dtype)


@_with_gradient.defjvp
def _gradient(dtype, body, primals, tangents):
    (x, w), (dx, _) = primals, tangents
    return _with_gradient(x, w, dtype, body), jnp.einsum("RI,OI->RO", dx, w.astype(dx.dtype)).astype(dtype)


def _of_floats(x: Array, w: Int8) -> Array:
    """The barrier keeps XLA from converting W ahead of a loop, for all of a model."""
    values, x = jax.lax.optimization_barrier((w.values, x))
    return jnp.einsum("RI,OI->RO", x, values.astype(x.dtype), preferred_element_type=jnp.float32) * w.scale[:, 0]


LEAST_ROWS = 4  # of a product: XLA on CPU takes ten times as long for one, and the same up to eight
WIDEST = 2**31 // 127**2  # inputs whose products surely fit in a sum of 32 bits


def _of_wholes(x: Array, w: Int8) -> Array:
    """Summed in whole numbers, as XLA on CPU would write all of W out as floats first.

    x becomes two rows of 8 bits, the second of what the first leaves: 15 bits stay of a row's largest magnitude.
    """
    rule = f"a matrix in 8 bits has {x.shape[1]:,} inputs, and at most {WIDEST:,} can be summed"
    require(x.shape[1] <= WIDEST, f"{rule}; keep the floats")
    first = to_int8(x)
    rest = to_int8(x.astype(jnp.float32) - first.astype(jnp.float32))
    values, scale = (jnp.concatenate(part) for part in zip(first, rest, strict=True))
    values = jnp.pad(values, ((0, max(0, LEAST_ROWS - len(values))), (0, 0)))
    y = jnp.einsum("RI,OI->RO", values, w.values, preferred_element_type=jnp.int32)[: 2 * len(x)] * scale
    return (y[: len(x)] + y[len(x) :]) * w.scale[:, 0]


def quantize(params: PyTree) -> Any:
    """The parameter tree with its matrices in 8 bits, a scale for each output: for decoding, not for training.

    Kernels and the tables of tokens are changed, which are nearly all of a model; the rest stays. On a CPU, the vectors
    that they multiply keep 15 bits of their largest place.

    >>> quantize({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)})["kernel"].values.dtype
    dtype('int8')

    Raises:
        InputError: there is no such matrix, or they are in 8 bits already.
    Source: Dettmers et al. 2022 (LLM.int8()), §2.1, without its outliers: symmetric, absolute maximum, by row.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = ["/" + jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    matrices = [name.endswith(MATRICES) and not name.endswith(FLOATS) for name in names]
    twice = any(name.endswith("/values") for name in names)
    require(not twice, "params holds matrices in 8 bits already; use them as they are")
    require(any(matrices), f"params holds no {' or '.join(MATRICES)} to put in 8 bits; give a model's parameters")
    return tree.unflatten(
        to_int8(jnp.asarray(leaf)) if is_one else leaf for is_one, (_, leaf) in zip(matrices, leaves, strict=True)
    )
