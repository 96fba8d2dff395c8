"""Each optimiser by name is its paper's formula, on any devices, and a checkpoint changes nothing."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tx_jax as tx
from tx_jax import InputError, MeshConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, checkpoint
from tx_jax.saver import Saver
from tx_jax.stacked import stack_layers, unstack_layers
from tx_jax.training.optim import OPTIMIZERS, layer_rates, mean_params

V, B, T = 16, 8, 5
CFG = ModelConfig(vocab_size=V, d_model=16, n_heads=4, n_layers=2, max_len=8, biases="all", tie_head=False)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(0)
PARAMS = {  # (out, in), and vectors
    "blocks_0": {"up": {"kernel": RNG.normal(size=(130, 128)), "bias": RNG.normal(size=(130,))}},
    "head": {"map": {"kernel": RNG.normal(size=(3, 5))}},
}
GRADIENTS = [jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), PARAMS) for _ in range(3)]


def config(name, **more):
    numbers = {"schedule": "constant", "warmup_steps": 0, "peak_lr": 0.02, "beta1": 0.8, "clip_norm": None}
    return OptimConfig(**numbers | {"name": name, "weight_decay": 0.3, "end_lr": 0.0} | more)


def updated(cfg, gradients=GRADIENTS):
    """The parameters after all gradients, and the optimiser's state."""
    optimizer = tx.make_optimizer(cfg, n_steps=9)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PARAMS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        changes, state = update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient), state, params)
        params = optax.apply_updates(params, changes)
    return params, state


def lion(cfg, w, gradients, decay):
    """Chen et al. 2023, program 1."""
    m = 0.0
    for g in gradients:
        w = w - cfg.peak_lr * (np.sign(cfg.beta1 * m + (1 - cfg.beta1) * g) + decay * w)
        m = cfg.beta2 * m + (1 - cfg.beta2) * g
    return w


def adamw(cfg, w, gradients, decay):
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = cfg.beta1 * m + (1 - cfg.beta1) * g, cfg.beta2 * v + (1 - cfg.beta2) * g**2
        step = m / (1 - cfg.beta1**t) / (np.sqrt(v / (1 - cfg.beta2**t)) + cfg.eps)
        w = w - cfg.peak_lr * (step + decay * w)
    return w


def adafactor(cfg, w, gradients, decay):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.tensor(w))
    if min(w.shape) < 128:  # of a small matrix, rows and columns are not summed: as of a vector
        parameter = torch.nn.Parameter(torch.tensor(w).reshape(-1))
    optimizer = torch.optim.Adafactor([parameter], lr=cfg.peak_lr, weight_decay=decay)
    for g in gradients:
        parameter.grad = torch.tensor(g).reshape(parameter.shape)
        optimizer.step()
    return parameter.detach().numpy().reshape(w.shape)


def muon(cfg, w, gradients, decay):
    """Jordan et al. 2024 with Nesterov's momentum, and an update's size by Liu et al. 2025, eq. 4."""
    if w.shape != (130, 128):
        return adamw(cfg, w, gradients, decay)
    m, a, b, c, beta = 0.0, 3.4445, -4.7750, 2.0315, 0.95
    for t, g in enumerate(gradients, start=1):
        m = beta * m + (1 - beta) * g
        x = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        x = x / np.linalg.norm(x)
        for _ in range(5):
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        w = w - cfg.peak_lr * (0.2 * math.sqrt(130) * x + decay * w)
    return w


def schedule_free(cfg, y, gradients, decay):
    """Defazio et al. 2024, algorithm 1: z steps, x is the mean of all z, y, between them, has the gradients."""
    z = x = y
    v = 0.0
    for t, g in enumerate(gradients, start=1):
        v = cfg.beta2 * v + (1 - cfg.beta2) * g**2
        z = z - cfg.peak_lr * (g / (np.sqrt(v / (1 - cfg.beta2**t)) + cfg.eps) + decay * y)
        x = (1 - 1 / t) * x + z / t
        y = (1 - cfg.beta1) * z + cfg.beta1 * x
    return y if cfg.name == "schedule-free" else x


ORACLES = {"adamw": adamw, "lion": lion, "adafactor": adafactor, "muon": muon, "schedule-free": schedule_free}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_is_its_formula(name):
    cfg = config(name)
    got, state = updated(cfg)
    flat = [jax.tree.leaves(gradient) for gradient in GRADIENTS]
    for i, (path, w) in enumerate(jax.tree_util.tree_leaves_with_path(PARAMS)):
        decay = 0.0 if path[-1].key == "bias" else 0.3
        expected = ORACLES[name](cfg, w, [gradient[i] for gradient in flat], decay)
        np.testing.assert_allclose(jax.tree.leaves(got)[i], expected, rtol=1e-4, atol=1e-4, err_msg=str(path))
    mean = mean_params(state, got)
    assert (mean is None) == (name != "schedule-free")
    if mean is not None:
        x = schedule_free(config("adamw"), w, [gradient[-1] for gradient in flat], 0.3)  # of the last leaf
        np.testing.assert_allclose(jax.tree.leaves(mean)[-1], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_first_moments_may_be_bfloat16(name):
    for dtype in ("float32", "bfloat16"):
        params, state = updated(config(name, moment_dtype=dtype))
        kinds = {
            leaf.dtype.name
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if "/mu/" in jax.tree_util.keystr(path, simple=True, separator="/")
        }
        assert kinds == {dtype}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_stacked_layers_are_updated_as_each_alone():
    """Of shape (layers, out, in): muon's matrices are the last two axes, and vectors of layers do not decay."""
    apart = {
        f"blocks_{i}": {"up": {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32), "scale": jnp.ones(4)}}
        for i in range(5)  # of two kinds in turn, and one over
    }
    for name in ("adamw", "muon"):
        optimizer = tx.make_optimizer(config(name, layer_lr_decay=0.5), n_steps=1)
        changes = [
            optimizer.update(jax.tree.map(jnp.cos, params), optimizer.init(params), params)[0]
            for params in (stack_layers(apart, period=2), apart)
        ]
        assert "scanned" in changes[0]
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
            unstack_layers(changes[0]),
            changes[1],
        )


def test_a_learning_rate_for_each_layer():
    shapes = jax.eval_shape(lambda: tx.init_params(tx.build(CFG), jax.random.key(0)))
    rates = layer_rates(shapes, 0.5)
    assert set(jax.tree.leaves(rates["stack"]["blocks_1"])) == {0.5}
    assert set(jax.tree.leaves(rates["stack"]["blocks_0"])) == {0.25}
    assert rates["embed"]["table"] == 0.125
    assert set(jax.tree.leaves((rates["head"], rates["stack"]["last_norm"]))) == {1.0}
    params, _ = updated(config("adamw", layer_lr_decay=0.5), GRADIENTS[:1])
    plain, _ = updated(config("adamw"), GRADIENTS[:1])
    old, half, full = PARAMS["blocks_0"]["up"], params["blocks_0"]["up"], plain["blocks_0"]["up"]
    np.testing.assert_allclose(half["kernel"] - old["kernel"], (full["kernel"] - old["kernel"]) / 2, atol=1e-6)
    np.testing.assert_allclose(params["head"]["map"]["kernel"], plain["head"]["map"]["kernel"])


def make(name):
    # An ε this large makes an update nearly linear in the gradient; otherwise rounding decides the sign of small ones.
    cfg = config(name, peak_lr=0.001 if name == "lion" else 0.01, eps=1e-2)
    model, optimizer = tx.build(CFG), tx.make_optimizer(cfg, n_steps=9)
    start = functools.partial(tx.init_state, model, optimizer, ema=name == "schedule-free")
    return tx.make_train_step(model, optimizer), jit(start)(jax.random.key(0))


def make_batch(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(V, size=(B, T + 1)).astype(np.int32)
    real = np.arange(T) < rng.integers(T + 1, size=(B, 1))
    return tx.Batch(
        *map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], real.astype(np.float32), np.where(real, np.arange(T), -1)))
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_devices_and_a_checkpoint_change_nothing(name, tmp_path):
    """On data 2 × fsdp 4 and on one device the same update; saved, restored and gone on: the same bits."""
    results = []
    for mesh in (tx.make_mesh(MeshConfig(data=2, fsdp=4)), None):
        step, state = make(name)
        launcher = tx.jit_step(step, state, mesh)
        state = launcher.put_state(state)
        for seed in range(2):
            state, _ = launcher.step(state, launcher.put_batch(make_batch(seed)))
        results.append(jax.device_get(state.params))
        if mesh is not None:
            sizes = {leaf.size // leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.opt_state)}
            assert sizes == {1, 4}  # split like the parameters, where they are
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), *results)
    with Saver(tmp_path, 1) as save:
        save(2, state.moving, {})
    restored, _ = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state.moving))
    restored = launcher.put_state(state._replace(**jax.tree.map(jnp.copy, restored)._asdict()))
    state, restored = (launcher.step(each, launcher.put_batch(make_batch(9)))[0] for each in (state, restored))
    for one, other in zip(jax.tree.leaves(state.moving), jax.tree.leaves(restored.moving), strict=True):
        np.testing.assert_array_equal(
            *(jax.random.key_data(x) if x.dtype == state.key.dtype else x for x in (one, other))
        )
    if name == "schedule-free":
        mean = mean_params(state.opt_state, state.params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.ema, mean)
        assert not np.allclose(state.ema["embed"]["table"], state.params["embed"]["table"], atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"layer_lr_decay": 0.0}, "layer_lr_decay=0.0 must be above 0 and at most 1, which is none; 0.9 is usual"),
        (
            {"name": "adafactor", "moment_dtype": "bfloat16"},
            "moment_dtype='bfloat16' has no effect with name='adafactor', which keeps no first moment; leave it out",
        ),
        (
            {"name": "schedule-free"},
            "schedule='cosine' does not go with name='schedule-free'; give --optim.schedule constant",
        ),
        (
            {"name": "schedule-free", "schedule": "constant", "beta1": 0.0},
            "beta1=0 is no mean for name='schedule-free'; 0.9 is usual",
        ),
    ],
)
def test_refused(wrong, text):
    with pytest.raises(InputError, match="^" + re.escape(text)):
        OptimConfig(**wrong)


@pytest.mark.parametrize(("train", "name"), [({"ema_rate": 0.9}, "ema_rate"), ({"n_averaged": 2}, "n_averaged")])
def test_two_means_are_refused(train, name):
    text = f"train.{name} and optim.name='schedule-free' are two means; leave train.{name} out"
    with pytest.raises(InputError, match="^" + re.escape(text)):
        RunConfig(optim=OptimConfig(name="schedule-free", schedule="constant"), train=TrainConfig(**train))
