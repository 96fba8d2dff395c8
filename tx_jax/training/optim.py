"""Optimisers by name, with clipping and a learning rate that changes with the step, put together from optax."""

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

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
    """Learning rate by optimiser step, of a run of n_steps: linear from 0 to peak_lr, then cfg.schedule.

    >>> rate = make_schedule(OptimConfig(peak_lr=1.0, end_lr=0.0, warmup_steps=10), n_steps=110)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    Source: cosine: Loshchilov & Hutter 2017, eq. 5; noam: Vaswani et al. 2017, eq. 3; wsd: Hu et al. 2024, §4.
    """
    warmup = optax.linear_schedule(0.0, cfg.peak_lr, cfg.warmup_steps)
    after = SCHEDULES[cfg.schedule](cfg, n_steps)
    return optax.join_schedules([warmup, after], [cfg.warmup_steps]) if cfg.warmup_steps else after


def path_of(path: tuple) -> str:
    """The path of a leaf, as stack/blocks_0/mlp/up/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decays(params: optax.Params) -> Any:
    """True for what weight decay applies to: tables and kernels, not biases and norms, also of stacked layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ndim(leaf) >= 2 and path_of(path).split("/")[-1] not in NO_DECAY, params
    )


NO_DECAY = ("bias", "scale", "offset")


def _adamw(cfg: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Loshchilov & Hutter 2019."""
    how = {"weight_decay": cfg.weight_decay, "mask": decays, "mu_dtype": cfg.moment_dtype}
    return optax.adamw(rate, cfg.beta1, cfg.beta2, cfg.eps, **how)


def _lion(cfg: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Chen et al. 2023 , program 1; §5 there: a tenth to a third of AdamW's peak_lr."""
    how = {"weight_decay": cfg.weight_decay, "mask": decays, "mu_dtype": cfg.moment_dtype}
    return optax.lion(rate, cfg.beta1, cfg.beta2, **how)


def _adafactor(cfg: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, algorithms 4 and 5: no first moment, and of matrices of 128 × 128 or more row and column
    sums of the second; steps in parts of a parameter's size. Weight decay × learning rate, as in the others."""
    return optax.adafactor(rate, weight_decay_rate=lambda step: cfg.weight_decay * rate(step), weight_decay_mask=decays)


def is_hidden(params: optax.Params) -> Any:
    """True for the maps from width to width: kernels, but the head's."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: re.search(r"(?<!head/map)/kernel$", path_of(path)) is not None, params
    )


def _muon(cfg: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Jordan et al. 2024, for the maps of the blocks, and AdamW for tables, the head and vectors. An update's RMS is
    0.2, near AdamW's, so that both have one learning rate and decay (Liu et al. 2025, eq. 4)."""
    kernels = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)  # (out, in), after any layers
    muon = optax.contrib.muon(
        rate, weight_decay=cfg.weight_decay, mu_dtype=cfg.moment_dtype, consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda leaf: kernels, params),
    )  # fmt: skip

    def label(params: optax.Params) -> Any:
        return jax.tree.map(lambda hidden: "muon" if hidden else "adamw", is_hidden(params))

    return optax.multi_transform({"muon": muon, "adamw": _adamw(cfg, rate)}, label)


def _schedule_free_base(cfg: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW without a first moment, whose place the mean takes."""
    return optax.chain(
        optax.scale_by_rms(cfg.beta2, cfg.eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(cfg.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )


OPTIMIZERS = {  # by OptimConfig.name: (config, learning rate by step) → updates, clipping apart
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "schedule-free": _schedule_free_base,
}


def layer_rates(params: optax.Params, decay: float) -> Any:
    """A factor for each leaf, 1 at the head and × decay for each block that is farther from it; the embeddings are the
    farthest. Source: Clark et al. 2020 (ELECTRA), appendix A, and its code.

    Blocks are numbered by their path; if layers are stacked (`stack_layers`), also by their first axis.
    """
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    blocks = {name: found for name in leaves if (found := BLOCK.search(name))}
    kinds = collections.Counter(stack for stack, kind in {(found[1], found[3]) for found in blocks.values()} if kind)
    numbers = {
        name: np.arange(len(leaves[name])) * kinds[found[1]] + int(found[3]) if found[3] else np.array(int(found[2]))
        for name, found in blocks.items()
    }
    counts: dict[str, int] = {}  # of blocks, by stack
    for name, found in blocks.items():
        counts[found[1]] = max(counts.get(found[1], 0), int(numbers[name].max()) + 1)
    farthest = decay ** (max(counts.values(), default=0) + 1)

    def rate(path: tuple, leaf: Any) -> Any:
        name = path_of(path)
        if name not in blocks:
            return farthest if FIRST.search(name) else 1.0
        rates = decay ** (counts[blocks[name][1]] - numbers[name]).astype(np.float32)
        return rates.reshape(-1, *[1] * (leaf.ndim - 1)) if rates.ndim else rates

    return jax.tree_util.tree_map_with_path(rate, params)


BLOCK = re.compile(r"(.*/|^)(?:blocks_(\d+)|scanned/(\d+))/")
FIRST = re.compile(r"(^|/)(table|types)$|(^|/)first_norm/")  # what is before all blocks


def width_rates(params: optax.Params, ratio: float) -> Any:
    """A factor for each leaf: muP's 1 / ratio for the maps from width to width. Source: Yang et al. 2022, table 8."""
    return jax.tree.map(lambda hidden: 1 / ratio if hidden else 1.0, is_hidden(params))


def scale_by(rates: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Updates × a tree of factors made of them: a learning rate for each parameter."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rates(updates)))


def make_optimizer(cfg: OptimConfig, n_steps: int, width_ratio: float = 1.0) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimiser that cfg.name says, in a run of n_steps.

    Args:
        width_ratio: that of a ModelConfig with muP.

    >>> optimizer, params = make_optimizer(OptimConfig(warmup_steps=0), n_steps=10), {"scale": jnp.ones(3)}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> [f"{number:.4f}" for number in updates["scale"]]  # −peak_lr in the first step of AdamW
    ['-0.0010', '-0.0010', '-0.0010']

    Source: adamw: Loshchilov & Hutter 2019; lion: Chen et al. 2023; adafactor: Shazeer & Stern 2018; muon: Jordan et
        al. 2024; schedule-free: Defazio et al. 2024.
    """
    rate = make_schedule(cfg, n_steps)
    parts = [OPTIMIZERS[cfg.name](cfg, rate)]
    if cfg.layer_lr_decay != 1:
        parts += [scale_by(lambda updates: layer_rates(updates, cfg.layer_lr_decay))]
    if width_ratio != 1:
        parts += [scale_by(lambda updates: width_rates(updates, width_ratio))]
    if cfg.name == "schedule-free":  # around all that makes an update: the mean is of what was really done
        parts = [optax.contrib.schedule_free(chain(parts), rate, cfg.beta1)]
    return chain(parts if cfg.clip_norm is None else [optax.clip_by_global_norm(cfg.clip_norm), *parts])


def chain(parts: Sequence[optax.GradientTransformation]) -> optax.GradientTransformation:
    """The parts one after another; one part alone as it is."""
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def mean_params(opt_state: optax.OptState, params: optax.Params) -> Any:
    """The mean that a schedule-free state implies, which is what to evaluate, or None if it is of another optimiser.

    Source: Defazio et al. 2024 (The Road Less Scheduled), eq. 1 and 3: the parameters are where gradients are taken.
    """
    free: Any = optax.contrib.ScheduleFreeState
    found = [
        state for state in jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, free)) if isinstance(state, free)
    ]
    return optax.contrib.schedule_free_eval_params(found[0], params) if found else None
