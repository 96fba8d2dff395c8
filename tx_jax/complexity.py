"""What a model costs, from its configuration alone: nothing is allocated and nothing is run."""

from collections.abc import Callable
from typing import Any

import jax

from tx_jax.config import ModelConfig
from tx_jax.models import build, init_params

FORWARD, ACTIVATIONS, WEIGHTS = 2, 2, 2  # FLOPs for each parameter and token: the product, and its two gradients


def make_train_flops(cfg: ModelConfig, *, adapters: bool = False) -> Callable[[Any], float]:
    """(Batch or PairBatch) → the floating-point operations that a training step on it needs, padding apart.

    Products with kernels, 6 for each parameter and token, and those of attention, of whole rows though it be causal.
    What is computed again to save memory (`remat`) is not counted: this is the numerator of MFU.

    Args:
        adapters: the kernels are frozen and have no gradient.

    >>> from tx_jax import Batch, ModelConfig
    >>> cfg = ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1, d_mlp=16, mlp="relu")
    >>> ids = jax.numpy.ones((1, 10), int)
    >>> make_train_flops(cfg)(Batch(ids, ids, ids)) == 10 * (6 * (4 * 8 * 8 + 2 * 8 * 16 + 7 * 8) + 12 * 8 * 10)
    True

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    of_source, of_tokens = _kernels(cfg)
    each = FORWARD + ACTIVATIONS + WEIGHTS * (not adapters)
    pair = 3 * 2 * cfg.n_heads * (cfg.H + cfg.Hv)  # FLOPs for a query and a key: two products, three times
    n_encoder = (cfg.n_encoder_layers or cfg.n_layers) if cfg.stack == "encoder_decoder" else 0
    windows = [cfg.window if kind == "w" else None for kind in cfg.window_pattern]
    windows = [windows[i % len(windows)] for i in range(cfg.n_layers)]

    def flops(batch: Any) -> float:
        n, T = batch.n_tokens, batch.tokens.shape[1]
        n_source, S = (batch.n_source_tokens, batch.source.shape[1]) if n_encoder else (0, 0)
        keys = sum(min(T, window or T) for window in windows) + len(windows) * S
        return float(each * (of_source * n_source + of_tokens * n) + pair * (n * keys + n_encoder * n_source * S))

    return flops


def _kernels(cfg: ModelConfig) -> tuple[int, int]:
    """How many parameters multiply each source token, and each token."""
    shapes = jax.eval_shape(lambda key: init_params(build(cfg), key), jax.random.key(0))
    of_source = of_tokens = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = "/".join(entry.key for entry in path)
        if name.startswith("encoder/") or "cross_attention/k/" in name or "cross_attention/v/" in name:
            of_source += leaf.size * name.endswith("kernel")
        else:
            active = cfg.n_experts_per_token / cfg.E if "/experts/" in name else 1  # of the mixture, what a token reads
            of_tokens += int(leaf.size * active) * (name.endswith("kernel") or (name == "embed/table" and cfg.tie_head))
    return of_source, of_tokens
