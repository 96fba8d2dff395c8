"""Adapters are their formula in NumPy, begin as nothing, and are all that a run with them trains, wherever it runs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import Batch, LoraConfig, MeshConfig, ModelConfig, OptimConfig
from tx_jax.lora import Adapter
from tx_jax.modules.linear import Linear
from tx_jax.parallel import AXIS
from tx_jax.training.start import first_state, make_assemble

CFG = ModelConfig(vocab_size=13, d_model=16, n_heads=4, n_kv_heads=2, n_layers=1, mlp="swiglu", biases="qkv")
LORA = LoraConfig(rank=2, alpha=6.0)
KEY = jax.random.key(0)
ADAMW = OptimConfig(schedule="constant", warmup_steps=0, peak_lr=0.03, eps=1e-2)  # as in training/test_step.py
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # quick to compile
rng = np.random.default_rng(0)
TOKENS = rng.integers(13, size=(8, 6))
BATCH = Batch(*(jnp.asarray(x) for x in (TOKENS[:, :-1], TOKENS[:, 1:], rng.choice([0.0, 1.0], size=(8, 5)))))


@pytest.fixture(scope="module")
def params():
    return tx.init_params(tx.build(CFG), KEY)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def filled(tree):
    """With values in place of the zeros that adapters begin with."""
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


def in_numpy(params, lora, alpha):
    """Hu et al. 2021, eq. 3, one kernel after the other, in float64."""
    found, adapters = flat(params), flat(lora)
    for name in {path.rpartition("/")[0] for path in adapters}:
        a, b = (np.float64(adapters[f"{name}/{part}"]) for part in "ab")
        found[name] = found[name] + alpha / len(a) * b @ a
    return found


def test_what_is_adapted(params):
    lora = tx.init_lora(params, KEY, rank=2)
    paths = [f"stack/blocks_0/attention/{name}/kernel/{part}" for name in "qv" for part in "ab"]
    assert sorted(flat(lora)) == sorted(paths)
    assert {name[-3:]: leaf.shape for name, leaf in flat(lora).items() if "/v/" in name} == {
        "l/a": (2, 16),
        "l/b": (8, 2),
    }
    others = tx.init_lora(params, KEY, 3, r"(mlp/.*|out)/kernel$|embed")
    assert len(jax.tree.leaves(others)) == 2 * (4 + 1)
    shapes = jax.eval_shape(lambda: params)
    jax.tree.map(np.testing.assert_array_equal, tx.init_lora(shapes, KEY, 2), lora)
    a = np.concatenate([leaf.ravel() for name, leaf in flat(lora).items() if name.endswith("/a")])
    assert abs(a).max() <= 0.25  # 1 / √16
    assert len(np.unique(a)) > 60  # a key each


@pytest.mark.parametrize("targets", [LORA.targets, r"(kernel|table)$"])
def test_merged_is_the_formula_and_at_first_nothing(params, targets):
    lora = tx.init_lora(params, KEY, rank=2, targets=targets)
    jax.tree.map(np.testing.assert_array_equal, tx.merge_lora(params, lora, 6.0), params)
    lora = filled(lora)
    merged, wanted = flat(tx.merge_lora(params, lora, 6.0)), in_numpy(params, lora, 6.0)
    assert merged.keys() == wanted.keys()
    for name, leaf in merged.items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-5, atol=1e-5)


def test_a_merged_map_is_the_map_and_its_adapter():
    module, x = Linear(CFG, 7, "qkv"), jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)
    base = module.init(KEY, x)["params"]
    lora = filled(tx.init_lora(base, KEY, 2, "kernel"))
    a, b = (np.float64(part) for part in lora["kernel"])
    apart = module.apply({"params": base}, x) + 3.0 * (np.float64(x) @ a.T) @ b.T
    np.testing.assert_allclose(module.apply({"params": tx.merge_lora(base, lora, 6.0)}, x), apart, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_added_to_in_float32():
    kernel = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    lora = {"kernel": Adapter(jnp.full((1, 4), 1.0), jnp.full((4, 1), 0.0117))}
    merged = tx.merge_lora(kernel, lora, 1.0)["kernel"]
    assert merged.dtype == jnp.bfloat16
    assert (merged == jnp.bfloat16(1.0117)).all()


def make(lora=LORA, model=CFG, start=jit, **more):
    model, optimizer = tx.build(model), tx.make_optimizer(ADAMW, n_steps=100)
    state = start(first_state, static_argnums=(0, 1, 2))(lora, model, optimizer, KEY)
    return tx.make_train_step(model, optimizer, assemble=make_assemble(lora), **more), state


def shapes(init, static_argnums):
    """In place of `jit`: nothing is made."""
    return lambda lora, model, optimizer, key: jax.eval_shape(lambda key: init(lora, model, optimizer, key), key)


LAUNCHERS = {
    "one device": lambda step, state: tx.jit_step(step, state),
    "pmap": lambda step, state: tx.pmap_step(step),
    "data 2 × fsdp 2 × tensor 2": lambda step, state: tx.jit_step(
        step, state, tx.make_mesh(MeshConfig(fsdp=2, tensor=2))
    ),
}


def launch(name):
    step, state = make(axis_name=AXIS if name == "pmap" else None)
    before = flat(state.frozen)
    launcher = LAUNCHERS[name](step, state)
    state, losses = launcher.put_state(state), []
    for _ in range(12):
        state, metrics = launcher.step(state, launcher.put_batch(BATCH))
        losses.append(float(metrics.loss))
    return losses, before, launcher.host_state(state)


@pytest.fixture(scope="module")
def one_device():
    return launch("one device")


def test_adapters_alone_are_trained(one_device):
    losses, before, state = one_device
    assert losses[-1] < losses[0] - 0.03
    for name, leaf in flat(state.frozen).items():
        np.testing.assert_array_equal(leaf, before[name])
    n_trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert n_trained == 2 * (16 + 16) + 2 * (16 + 8)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * n_trained
    assert all(leaf.any() for leaf in flat(state.params).values())


@pytest.mark.parametrize("name", list(LAUNCHERS)[1:])
def test_any_number_of_devices_gives_the_same_update(name, one_device):
    losses, _, state = launch(name)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    for leaf, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(one_device[2].params), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)


def test_no_memory_for_gradients_of_the_base():
    """Nor is the base a constant of the program, or copied from the old state to the new."""
    wide = ModelConfig(vocab_size=13, d_model=64, n_heads=4, n_layers=1, d_mlp=4096, mlp="swiglu")
    one_row, used = jax.tree.map(lambda leaf: leaf[:1], BATCH), {}
    for rank in (0, 2):
        step, state = make(LoraConfig(rank=rank), wide, start=shapes)
        used[rank] = jit(step, donate_argnums=0).lower(state, one_row).compile().memory_analysis()
    base = 4 * tx.count_params(wide)
    assert used[0].temp_size_in_bytes > base
    assert used[2].temp_size_in_bytes < base / 4
    assert base < used[2].argument_size_in_bytes < 1.1 * base < 3 * base < used[0].argument_size_in_bytes
    assert used[2].alias_size_in_bytes > base


REFUSED = {  # (rank, targets): what the message says
    (0, "q"): "rank=0 must be at least 1; 8 is usual",
    (9, "/v/kernel"): "rank=9 exceeds what stack/blocks_0/attention/v/kernel of [8, 16] has; use at most 8, or narrow",
    (
        2,
        "attention/q",
    ): "targets='attention/q' matches stack/blocks_0/attention/q/bias, which is [16], no matrix; narrow",
    (
        2,
        "c_attn",
    ): "targets='c_attn' matches no parameter; there are stack/blocks_0/attention/k/kernel, stack/blocks_0/",
    (2, "("): "targets='(' is not a regular expression (missing ), unterminated subpattern at position 0); the default",
}


@pytest.mark.parametrize(("rank", "targets"), REFUSED)
def test_refused(params, rank, targets):
    with pytest.raises(tx.InputError, match=re.escape(REFUSED[rank, targets])):
        tx.init_lora(params, KEY, rank, targets)


def test_adapters_of_another_model(params):
    lora = tx.init_lora(params, KEY, 2)
    with pytest.raises(tx.InputError, match="adapters of stack have no such parameters; they are of another model"):
        tx.merge_lora({"embed": params["embed"]}, lora, 1.0)
    with pytest.raises(tx.InputError, match=r"^a matrix in 8 bits takes no adapter; train with floats and"):
        tx.merge_lora(tx.quantize(params), lora, 1.0)
    with pytest.raises(tx.InputError, match=r"^a matrix in 8 bits takes no adapter; train with floats and"):
        tx.init_lora(tx.quantize(params), KEY, 1, "attention/q/kernel")
    narrow = {"kernel": jnp.ones((8, 15))}
    with pytest.raises(tx.InputError, match=re.escape("an adapter of [8, 16] does not fit [8, 15]; use its own model")):
        tx.merge_lora(narrow, lora["stack"]["blocks_0"]["attention"]["v"], 1.0)
