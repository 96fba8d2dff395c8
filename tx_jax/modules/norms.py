"""Norms: statistics in float32 whatever the computation's dtype, parameters `scale` (and `bias`), or `offset`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tx_jax.config import ModelConfig
from tx_jax.modules.linear import BIASES


def layer_norm(cfg: ModelConfig, name: str | None = None) -> nn.Module:
    """Ba et al. 2016, eq. 4."""
    bias = "norm" in BIASES[cfg.biases]
    return nn.LayerNorm(
        epsilon=cfg.norm_eps, use_bias=bias, use_fast_variance=False, dtype=jnp.dtype(cfg.dtype), name=name
    )


def rms_norm(cfg: ModelConfig, name: str | None = None) -> nn.Module:
    """Zhang & Sennrich 2019, eq. 4."""
    return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=jnp.dtype(cfg.dtype), name=name)


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose parameter is what the scale exceeds 1 by, so that weight decay draws the scale to 1 (Gemma)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        wide = x.astype(jnp.float32)
        offset = self.param("offset", nn.initializers.zeros, x.shape[-1:])
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.cfg.norm_eps)
        return (wide * (1.0 + offset.astype(jnp.float32))).astype(self.cfg.dtype)


NORMS = {"layernorm": layer_norm, "rmsnorm": rms_norm, "rmsnorm_offset": OffsetRMSNorm}


def make_norm(cfg: ModelConfig, name: str | None = None) -> nn.Module:
    """The norm that cfg names, over the last axis."""
    return NORMS[cfg.norm](cfg, name=name)


def make_qk_norm(cfg: ModelConfig) -> nn.Module:
    """The norm of queries and keys, over a head: that of cfg, without a mean."""
    return rms_norm(cfg) if cfg.norm == "layernorm" else make_norm(cfg)
