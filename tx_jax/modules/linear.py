"""Linear maps, and how their weights begin. Kernels are stored (out, in), as Hugging Face stores them: a decoding
step reads each output's weights in one run of memory."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tx_jax.config import ModelConfig
from tx_jax.ops.int8 import Int8, int8_product

BIASES = {  # which linear maps and norms have one
    "none": frozenset[str](),
    "norm": frozenset({"norm"}),
    "mlp": frozenset({"norm", "mlp"}),
    "qkv": frozenset({"qkv"}),
    "attention": frozenset({"qkv", "out"}),
    "all": frozenset({"norm", "mlp", "qkv", "out"}),
}
KERNEL_INITS = {  # of a kernel; `share` is 1, or 1/√(2L) for the 2L maps whose results add up in the residual stream
    "normal": lambda share: nn.initializers.normal(0.02 * share),  # Radford et al. 2019, §2.3
    "xavier": lambda share: nn.initializers.xavier_uniform(in_axis=-1, out_axis=-2),  # Glorot & Bengio 2010, eq. 16
}
TABLE_INITS = {  # of an embedding table of width D
    "normal": lambda d_model: nn.initializers.normal(0.02),
    "xavier": lambda d_model: nn.initializers.normal(d_model**-0.5),  # unit length after × √D (Vaswani et al. 2017)
}


def product(
    x: Float[Array, "*b I"], kernel: Float[Array, "O I"] | Int8, dtype: Any, out_dtype: Any = None
) -> Float[Array, "*b O"]:
    """x Wᵀ over the last axis, of factors in `dtype`, summed and given in `out_dtype` (None: the same).

    One row a token: XLA on CPU copies the gradient of a (B, T, O) product, and recomputes it for each copy; and that of
    jaxlib 0.7 has no (B, T, O) product of bfloat16 on a CPU that has it.
    """
    rows, out_dtype = x.reshape(-1, x.shape[-1]).astype(dtype), out_dtype or dtype
    if isinstance(kernel, Int8):
        y = int8_product(rows, kernel, out_dtype)
    else:
        body = _of_halves if _is_few(rows, kernel) else _of_all
        y = body(rows, kernel.astype(dtype), out_dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _of_all(rows: Array, kernel: Array, out_dtype: Any) -> Array:
    return jnp.einsum("RI,OI->RO", rows, kernel, preferred_element_type=out_dtype)


FEW, LONG = range(2, 17), 768  # rows, and inputs from which on the halves are faster (benchmarks/RESULTS.md)


def _is_few(rows: Array, kernel: Array) -> bool:
    """Whether XLA on CPU is faster, up to three times, with two products of a kernel's halves than with one of all."""
    O, I = kernel.shape  # noqa: E741
    return len(rows) in FEW and I >= LONG and O % 2 == 0 and jax.default_backend() == "cpu"


def _of_halves(rows: Array, kernel: Array, out_dtype: Any) -> Array:
    halves = kernel.reshape(2, -1, kernel.shape[1])
    both = jnp.broadcast_to(rows.T, (2, *rows.T.shape))
    return jnp.matmul(halves, both, preferred_element_type=out_dtype).reshape(len(kernel), -1).T


class Linear(nn.Module):
    """x Wᵀ + b over the last axis, in cfg.dtype; `part` says whether there is a b (BIASES)."""

    cfg: ModelConfig
    features: int
    part: str
    residual: bool = False  # the result is added to the residual stream
    out_dtype: str | None = None  # None: cfg.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*b inner"]) -> Float[Array, "*b outer"]:
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        out_dtype = jnp.dtype(self.out_dtype or dtype)
        share = 1 / math.sqrt(2 * cfg.n_layers) if self.residual else 1.0
        share *= 1.0 if self.part == "head" else cfg.width_ratio**-0.5  # muP: Yang et al. 2022, table 8
        kernel: Any = self.param("kernel", KERNEL_INITS[cfg.init](share), (self.features, x.shape[-1]))
        y = product(x, kernel, dtype, out_dtype)
        if self.part in BIASES[cfg.biases]:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(out_dtype)
        return y
