"""The FLOPs of a training step, by which a run's utilisation is told."""

from collections.abc import Callable
from typing import Any

from tx_jax.complexity.leaves import leaves, windows
from tx_jax.config import ModelConfig

FORWARD, ACTIVATIONS, WEIGHTS = 2, 2, 2  # FLOPs for each parameter and token: the product, and its two gradients


def make_train_flops(cfg: ModelConfig, *, adapters: bool = False) -> Callable[[Any], float]:
    """(Batch or PairBatch) → the floating-point operations that a training step on it needs, padding apart.

    Products with kernels, 6 for each parameter and token, and those of attention, of whole rows though it be causal.
    What is computed again to save memory (`remat`) is not counted: this is the numerator of MFU.

    Args:
        adapters: the kernels are frozen and have no gradient.

    >>> import jax.numpy as jnp
    >>> from tx_jax import Batch, ModelConfig
    >>> cfg = ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1, d_mlp=16, mlp="relu")
    >>> ids = jnp.ones((1, 10), int)
    >>> make_train_flops(cfg)(Batch(ids, ids, ids)) == 10 * (6 * (4 * 8 * 8 + 2 * 8 * 16 + 7 * 8) + 12 * 8 * 10)
    True

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    kernels = [leaf for leaf in leaves(cfg) if leaf.name == "kernel"]
    of_source, of_tokens = (sum(x.matrix * x.times for x in kernels if x.of_source == side) for side in (True, False))
    each = FORWARD + ACTIVATIONS + WEIGHTS * (not adapters)
    pair = 3 * 2 * cfg.n_heads * (cfg.H + cfg.Hv)  # FLOPs for a query and a key: two products, three times
    n_encoder = (cfg.n_encoder_layers or cfg.n_layers) if cfg.stack == "encoder_decoder" else 0

    def flops(batch: Any) -> float:
        n, T = batch.n_tokens, batch.tokens.shape[1]
        n_source, S = (batch.n_source_tokens, batch.source.shape[1]) if n_encoder else (0, 0)
        keys = sum(windows(cfg, T)) + cfg.n_layers * S
        return float(each * (of_source * n_source + of_tokens * n) + pair * (n * keys + n_encoder * n_source * S))

    return flops
