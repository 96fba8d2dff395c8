"""8 bits against the floats that they stand for: products, whole models, caches."""

import os
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tx_jax as tx
from tests.test_laws import CONFIGS, ONE_STACK, T, draw_tokens, make, ragged, run
from tx_jax.errors import InputError
from tx_jax.ops.int8 import Int8, _of_floats, _of_wholes, _with_gradient, int8_product, to_int8
from tx_jax.parallel import P, shardings

NUMBERS = st.floats(-1e4, 1e4, width=32)


def floats(tree):
    """The tree with the arrays that its 8 bits stand for."""
    return jax.tree.map(lambda leaf: leaf.astype("float32"), tree, is_leaf=lambda leaf: isinstance(leaf, Int8))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (3, 7), elements=NUMBERS))
def test_no_place_is_off_by_more_than_half_a_step(x):
    found = to_int8(jnp.asarray(x))
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    assert (
        np.abs(np.asarray(found.astype("float32")) - x) <= step * 0.5001 + 1e-35
    ).all()  # XLA takes subnormal scales for 0
    assert found.values.dtype == jnp.int8
    assert abs(np.asarray(found.values)).max() <= 127


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product(n_rows, dtype):
    rng = np.random.default_rng(n_rows)
    w = to_int8(jnp.asarray(rng.normal(size=(5, 11)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(n_rows, 11)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(w.astype("float32"), np.float64).T
    found = int8_product(x, w, jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)  # of a row of x, 15 bits are kept


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "bert-mlm", "gemma2", "t5-lm", "mixtral"])
def test_a_model_is_that_of_the_floats(name):
    model, params = make(name)
    small, tokens = tx.quantize(params), draw_tokens(3)
    expected, _ = run(model, floats(small), tokens, ragged(T, 5, 1))
    found, _ = run(model, small, tokens, ragged(T, 5, 1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4 * np.abs(expected).max())
    exact, _ = run(model, params, tokens, ragged(T, 5, 1))
    assert np.abs(np.asarray(expected) - np.asarray(exact)).max() > 1e-4


def test_what_is_changed():
    """Matrices are, to a quarter of their bytes and a scale a row; norms, biases and learned positions are not."""
    _, params = make("gpt2")
    small = tx.quantize(params)
    block = small["stack"]["blocks_0"]
    assert isinstance(block["mlp"]["up"]["kernel"], Int8)
    assert isinstance(small["embed"]["table"], Int8)
    assert block["mlp"]["up"]["kernel"].scale.shape == (*block["mlp"]["up"]["bias"].shape, 1)
    same = {name: part for name, part in block["mlp"]["up"].items() if name != "kernel"}
    assert same == {"bias": params["stack"]["blocks_0"]["mlp"]["up"]["bias"]}
    assert not isinstance(small["stack"]["positions"]["table"], Int8)


@pytest.mark.parametrize("name", ["llama", "vaswani"])
def test_texts_are_written(name):
    model, params = make(name)
    small, prompt = tx.quantize(params), tx.pad_prompts([[1, 2, 3], [4]])
    found, expected = [], []
    for tree, out in ((small, found), (floats(small), expected)):
        more = {}
        if name == "vaswani":
            more["memory"] = model.apply({"params": tree}, prompt.tokens, prompt.positions, method="encode")
        out.append(tx.generate(model, tree, *prompt, max_new_tokens=6, **more).tokens.tolist())
    assert found == expected


@pytest.mark.parametrize("name", [name for name in ONE_STACK if CONFIGS[name].stack == "decoder"])
def test_a_cache_of_8_bits(name):
    """It is near that of floats, and what it gives does not depend on how a text is split."""
    model, params = make(name)
    tokens, positions = draw_tokens(2), ragged(T, 6)
    exact, _ = run(model, params, tokens, positions)

    def through(dtype, *cuts):
        cache, out = tx.init_cache(model.cfg, 2, 20, dtype), []
        for a, b in zip((0, *cuts), (*cuts, T), strict=True):
            logits, cache = run(model, params, tokens[:, a:b], positions[:, a:b], cache=cache)
            out.append(logits)
        return np.concatenate(out, axis=1), cache

    found, cache = through("int8", 5, 6, 11)
    np.testing.assert_allclose(through("int8")[0][positions >= 0], found[positions >= 0], rtol=1e-3, atol=1e-3)
    apart = np.abs(found - np.asarray(exact))[positions >= 0]
    assert 1e-6 < apart.max() < 0.2 * np.abs(exact).max()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.layers)} == {"int8", "float32"}


def test_a_cache_stays_as_it_begins():
    """The cache that texts go on from says in what theirs is, an empty one, too."""
    model, params = make("llama")
    prompt = tx.pad_prompts([[1, 2, 3], [4]])
    out = tx.generate(model, params, *prompt, max_new_tokens=6, prefix=tx.init_cache(model.cfg, 1, 1, "int8"))
    assert out.cache.layers[0].k.values.dtype == jnp.int8
    plain = tx.generate(model, params, *prompt, max_new_tokens=6)
    np.testing.assert_allclose(out.log_probs[:, 0], plain.log_probs[:, 0], atol=0.1)
    half = tx.resize_cache(out.cache, 30, batch_size=4)
    for row in range(4):
        for p in range(int(out.cache.next_positions()[row // 2])):
            for old, new in zip(out.cache.layers[1], half.layers[1], strict=True):
                axis = 2 if old.shape[2] == out.cache.positions.shape[1] else 3
                for a, b in zip(old, new, strict=True):
                    np.testing.assert_array_equal(jnp.take(a[row // 2], p, axis - 1), jnp.take(b[row], p, axis - 1))


@pytest.mark.skipif(os.environ.get("COMPILE") != "well", reason="of programs as users compile them: COMPILE=well")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA of jaxlib 0.7 makes the copy")
def test_no_copy_in_floats_is_made_for_a_loop():
    """A program that writes a text needs little more than the 8 bits themselves."""
    model = tx.build(replace(CONFIGS["llama"], d_model=64, n_layers=6, d_mlp=512, vocab_size=300))
    params = tx.quantize(tx.init_params(model, jax.random.key(0)))
    logits, cache = jnp.zeros((1, 300)), tx.init_cache(model.cfg, 1, 16)
    loop = jax.jit(tx.decode, static_argnums=(0, 4)).lower(model, params, logits, cache, 8).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((params, cache)))
    assert loop.memory_analysis().temp_size_in_bytes < held


@pytest.mark.parametrize("body", [_of_wholes, _of_floats])
def test_the_gradient_is_that_of_the_floats(body):
    w = to_int8(jax.random.normal(jax.random.key(0), (5, 11)))
    x, y = jax.random.normal(jax.random.key(1), (3, 11)), jax.random.normal(jax.random.key(2), (3, 5))
    found = jax.grad(lambda x: (_with_gradient(x, w, jnp.float32, body) * y).sum())(x)
    np.testing.assert_allclose(found, y @ w.astype("float32"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(body(x, w), x @ w.astype("float32").T, rtol=0, atol=2e-4)


def test_rows_that_are_not_numbers_leave_others_alone():
    w, x = to_int8(jnp.ones((5, 11))), jnp.ones((3, 11)).at[1, 4].set(jnp.nan).at[2, 3].set(jnp.inf)
    found = int8_product(x, w, jnp.float32)
    np.testing.assert_allclose(found[0], 11, rtol=1e-4)
    assert np.isnan(found[1:]).all()


def test_more_inputs_than_can_be_summed_are_refused():
    with pytest.raises(InputError, match=r"^a matrix in 8 bits has 140,000 inputs, and at most 133,144 can be summed"):
        int8_product(jnp.ones((1, 140_000)), to_int8(jnp.ones((1, 140_000))), jnp.float32)


def test_they_lie_on_a_mesh_as_the_floats_do():
    model = tx.build(replace(CONFIGS["llama"], d_model=32, d_mlp=24))
    mesh, params = tx.make_mesh(tx.MeshConfig(fsdp=2, tensor=2)), tx.init_params(model, jax.random.key(0))
    small = tx.quantize(tx.fuse(params))
    placed = jax.device_put(small, shardings(small, mesh))
    block = placed["stack"]["blocks_0"]
    assert block["attention"]["qkv"]["kernel"].values.sharding.spec == P("tensor", "fsdp")
    assert block["attention"]["qkv"]["kernel"].scale.sharding.spec == P("tensor", None)
    assert block["mlp"]["down"]["kernel"].values.sharding.spec == P("fsdp", "tensor")
    expected, _ = run(model, small, draw_tokens(3), ragged(T, 5, 1))
    found, _ = run(model, placed, draw_tokens(3), ragged(T, 5, 1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_refused():
    with pytest.raises(InputError, match=r"^params holds matrices in 8 bits already; use them as they are"):
        tx.quantize(tx.quantize(make("llama")[1]))
    with pytest.raises(InputError, match=re.escape("params holds no /kernel or embed/table to put in 8 bits; give a")):
        tx.quantize({"bias": jnp.ones(3)})
    assert tx.init_cache(CONFIGS["llama"], 1, 4, jnp.int8).layers[0].k.values.dtype == jnp.int8
    text = "dtype='int4' is not one of float32, bfloat16, int8"
    with pytest.raises(InputError, match="^" + re.escape(text)):
        tx.init_cache(replace(CONFIGS["llama"], n_layers=1), 1, 4, "int4")
