"""AdamW with clipping and a learning rate that changes with the step, put together from optax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tx_jax.run_config import OptimConfig


def _cosine(cfg: OptimConfig, n_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(cfg.peak_lr, max(n_steps - cfg.warmup_steps, 1), cfg.end_lr / cfg.peak_lr)


def _noam(cfg: OptimConfig, n_steps: int) -> optax.Schedule:
    """∝ step^−0.5. Vaswani et al. 2017, eq. 3, is this with peak_lr = (d_model · warmup_steps)^−0.5."""
    return lambda step: cfg.peak_lr * (cfg.warmup_steps / (jnp.maximum(step, 0) + cfg.warmup_steps)) ** 0.5


def _wsd(cfg: OptimConfig, n_steps: int) -> optax.Schedule:
    """Constant, then linear to end_lr over decay_steps. Source: Hu et al. 2024 (MiniCPM), §4."""
    rest = max(n_steps - cfg.warmup_steps, 1)
    decay = min(max(n_steps // 5, 1) if cfg.decay_steps is None else cfg.decay_steps, rest)
    return optax.linear_schedule(cfg.peak_lr, cfg.end_lr, decay, rest - decay)


SCHEDULES = {  # of the steps after the warm-up
    "constant": lambda cfg, n_steps: optax.constant_schedule(cfg.peak_lr),
    "cosine": _cosine,
    "noam": _noam,
    "wsd": _wsd,
}


def make_schedule(cfg: OptimConfig, n_steps: int) -> Callable[[Any], Any]:
    """Learning rate by optimiser step, of a run of n_steps: linear from 0 to peak_lr, then cfg.schedule."""
    warmup = optax.linear_schedule(0.0, cfg.peak_lr, cfg.warmup_steps)
    after = SCHEDULES[cfg.schedule](cfg, n_steps)
    return optax.join_schedules([warmup, after], [cfg.warmup_steps]) if cfg.warmup_steps else after


VECTORS = ("bias", "scale", "offset")  # the last names of what is none, however many layers are stacked in it


def is_matrix(params: optax.Params) -> optax.Params:
    """True for what weight decay applies to: tables, kernels and adapters, not biases and norms."""

    def is_one(path: tuple, leaf: Any) -> bool:
        return jnp.ndim(leaf) >= 2 and getattr(path[-1], "key", None) not in VECTORS

    return jax.tree_util.tree_map_with_path(is_one, params)


def make_optimizer(cfg: OptimConfig, n_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW. Source: Loshchilov & Hutter 2019."""
    adamw = optax.adamw(
        make_schedule(cfg, n_steps), cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay, mask=is_matrix
    )
    return adamw if cfg.clip_norm is None else optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw)
