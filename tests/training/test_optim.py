"""The learning rate is its formula at every named step, and an update is clipped AdamW, written here in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import OptimConfig

UP = {0: 0.0, 3: 0.3, 9: 0.9, 10: 1.0}  # of all schedules: from 0 before the first update, to the peak after 10
SCHEDULES = {  # (config, steps of the run): learning rate by updates done
    "constant": ({}, 110, UP | {11: 1.0, 110: 1.0, 999: 1.0}),
    "cosine": ({}, 110, UP | {35: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 60: 0.55, 110: 0.1, 999: 0.1}),
    "noam": ({}, 110, UP | {40: 0.5, 90: 1 / 3, 1000: 0.1}),
    "wsd": ({"decay_steps": 40}, 110, UP | {70: 1.0, 80: 0.775, 90: 0.55, 110: 0.1, 999: 0.1}),
    "wsd, the last fifth": ({}, 100, UP | {80: 1.0, 85: 0.775, 100: 0.1}),
    "cosine, no warm-up": ({"warmup_steps": 0}, 100, {0: 1.0, 50: 0.55, 100: 0.1}),
    "constant, no warm-up": ({"warmup_steps": 0}, 100, {0: 1.0, 100: 1.0}),
    "cosine, all warm-up": ({"warmup_steps": 10}, 10, UP),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    numbers, n_steps, expected = SCHEDULES[name]
    cfg = OptimConfig(**{"schedule": name.split(",")[0], "peak_lr": 1.0, "end_lr": 0.1, "warmup_steps": 10} | numbers)
    schedule = tx.make_schedule(cfg, n_steps)
    for rate in (schedule, jax.jit(schedule)):
        np.testing.assert_allclose([rate(step) for step in expected], list(expected.values()), rtol=1e-5, atol=1e-7)


def test_noam_is_equation_3_of_the_paper():
    """Vaswani et al. 2017: d^−0.5 · min(step^−0.5, step · warmup^−1.5), where `step` is the updates already done: the
    first update has step 0 and rate 0, as every warm-up here, and the second has the paper's first rate."""
    d_model, warmup = 512, 40
    schedule = tx.make_schedule(
        OptimConfig(schedule="noam", peak_lr=(d_model * warmup) ** -0.5, end_lr=0.0, warmup_steps=warmup), 1000
    )
    paper = [d_model**-0.5 * min(step**-0.5, step * warmup**-1.5) for step in range(1, 400)]
    assert schedule(0) == 0
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(1, 400)), paper, rtol=1e-5)


PARAMS = {
    "kernel": np.array([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]]),
    "norm": {"scale": np.array([1.0, 2.0])},
    "count": np.array(3.0),
}
GRADIENTS = [jax.tree.map(lambda leaf, i=i: np.cos(leaf + i) * 5.0**-i, PARAMS) for i in range(4)]  # norms 2.5 … 0.02


def adamw(cfg, decays):
    """Loshchilov & Hutter 2019, algorithm 2, after clipping by the norm of the whole tree, leaf by leaf."""
    leaves, steps = jax.tree.leaves(PARAMS), [jax.tree.leaves(gradient) for gradient in GRADIENTS]
    for i, leaf in enumerate(leaves):
        m = v = 0.0
        for t, gradients in enumerate(steps, start=1):
            norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
            g = gradients[i] * min(1.0, (cfg.clip_norm or math.inf) / norm)
            m, v = cfg.beta1 * m + (1 - cfg.beta1) * g, cfg.beta2 * v + (1 - cfg.beta2) * g**2
            m_hat, v_hat = m / (1 - cfg.beta1**t), v / (1 - cfg.beta2**t)
            leaf = leaf - cfg.peak_lr * (m_hat / (np.sqrt(v_hat) + cfg.eps) + cfg.weight_decay * decays[i] * leaf)
        yield leaf


@pytest.mark.parametrize("clip_norm", [None, 0.3, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_an_update_is_clipped_adamw_that_decays_matrices_alone(clip_norm, weight_decay):
    cfg = OptimConfig(
        schedule="constant", warmup_steps=0, peak_lr=0.1, end_lr=0.0, beta1=0.8, beta2=0.9, eps=0.01,
        weight_decay=weight_decay, clip_norm=clip_norm,
    )  # fmt: skip
    optimizer = tx.make_optimizer(cfg, n_steps=4)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PARAMS)
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    decays = [leaf.ndim >= 2 for leaf in jax.tree.leaves(PARAMS)]
    assert decays == [False, True, False]
    for got, expected in zip(jax.tree.leaves(params), adamw(cfg, decays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_real_model_decays_tables_and_kernels_not_biases_and_norms():
    cfg = OptimConfig(schedule="constant", warmup_steps=0, weight_decay=0.5, peak_lr=0.1)
    model = tx.build(tx.ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1, biases="all", positions="learned"))
    shapes = jax.eval_shape(lambda: tx.init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    optimizer = tx.make_optimizer(cfg, n_steps=1)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        expected = -0.05 if path[-1].key in ("table", "kernel") else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))
