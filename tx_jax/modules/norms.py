"""Norms: statistics in float32 whatever the computation's dtype, parameters `scale` (and `bias`)."""

import flax.linen as nn
import jax.numpy as jnp

from tx_jax.config import ModelConfig
from tx_jax.modules.linear import BIASES


def layer_norm(cfg: ModelConfig) -> nn.Module:
    """Ba et al. 2016, eq. 4."""
    bias = "norm" in BIASES[cfg.biases]
    return nn.LayerNorm(epsilon=cfg.norm_eps, use_bias=bias, use_fast_variance=False, dtype=jnp.dtype(cfg.dtype))


def rms_norm(cfg: ModelConfig) -> nn.Module:
    """Zhang & Sennrich 2019, eq. 4."""
    return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=jnp.dtype(cfg.dtype))


NORMS = {"layernorm": layer_norm, "rmsnorm": rms_norm}


def make_norm(cfg: ModelConfig) -> nn.Module:
    """The norm that cfg names, over the last axis."""
    return NORMS[cfg.norm](cfg)
