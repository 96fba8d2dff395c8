"""A model whose matrices are one is the same model."""

import jax
import numpy as np
import pytest

import tx_jax as tx
from tests.test_laws import CONFIGS, ONE_STACK, T, draw_tokens, make, ragged, run
from tx_jax.errors import InputError


@pytest.mark.parametrize("name", [name for name in ONE_STACK if name not in ("bert", "alibi-encoder")])
def test_the_same_model(name):
    model, params = make(name)
    one = tx.fuse(params)
    parts = {"q", "k", "v"} if model.cfg.n_experts else {"gate", "q", "k", "v"}
    names = {part.key for path, _ in jax.tree_util.tree_leaves_with_path(one) for part in path}
    assert not names & parts
    assert "qkv" in names
    tokens, positions = draw_tokens(3), ragged(T, 5, 1)
    found, expected = (run(model, tree, tokens, positions)[0] for tree in (one, params))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-translator", "bart"])
def test_translations(name):
    """The queries and keys of cross-attention read different vectors, and stay apart."""
    model, params = make(name)
    one = tx.fuse(params)
    kept = one["decoder"]["blocks_0"]["cross_attention"]
    assert kept.keys() == params["decoder"]["blocks_0"]["cross_attention"].keys()
    source, prompt = draw_tokens(2), np.ones((2, 1), np.int32)
    outs = []
    for tree in (one, params):
        memory = run(model, tree, source, method="encode")
        outs.append(tx.generate(model, tree, prompt, max_new_tokens=5, memory=memory))
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_allclose(outs[0].log_probs, outs[1].log_probs, atol=1e-4)


def test_with_8_bits():
    model, params = make("llama")
    found, expected = (
        run(model, tree, draw_tokens(1))[0] for tree in (tx.quantize(tx.fuse(params)), tx.fuse(tx.quantize(params)))
    )
    np.testing.assert_array_equal(found, expected)
    assert CONFIGS["llama"].n_layers == sum(
        "qkv" in block["attention"] for name, block in tx.fuse(params)["stack"].items() if "block" in name
    )


def test_refused():
    with pytest.raises(
        InputError, match=r"^params holds no q, k, v or gate, up to be one matrix; give a model's param"
    ):
        tx.fuse(tx.fuse(make("llama")[1]))
