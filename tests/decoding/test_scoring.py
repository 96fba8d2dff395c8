"""A text's log-probabilities are those of whole forwards, however it is cut."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tx_jax as tx
from tx_jax import InputError
from tx_jax.decoding import scoring

V = 11
CFG = tx.ModelConfig(vocab_size=V, n_layers=2, n_heads=4, d_head=6, d_model=30, max_len=24)
CONFIGS = {"llama": replace(CFG, positions="rotary"), "vaswani": replace(CFG, stack="encoder_decoder")}
ROWS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 10]]


@functools.cache
def make(name):
    model = tx.build(CONFIGS[name])
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 10 * leaf, tx.init_params(model, jax.random.key(1)))
    if name == "llama":
        return model, params, {}
    return (
        model,
        params,
        {"memory": model.apply({"params": params}, *tx.pad_prompts([[7, 1], [2], [8, 8]]), method="encode")},
    )


@functools.cache
def forward(model):
    return jax.jit(lambda params, ids: jax.nn.log_softmax(model.apply({"params": params}, ids)[0][0]))


@pytest.mark.parametrize("part", [1, 4, 128])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_each_row_alone(name, part, monkeypatch):
    monkeypatch.setattr(scoring, "PART", part)
    model, params, memory = make(name)
    found = tx.score(model, params, *tx.pad_prompts(ROWS), **memory)
    for b, row in enumerate(ROWS):
        source = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], memory)
        logits, _ = model.apply({"params": params}, jnp.array([row]), **source, method="decode" if memory else None)
        expected = jax.nn.log_softmax(logits[0])[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(found[b, 1 : len(row)], expected, atol=1e-4)
        assert not found[b, len(row) :].any()
        assert found[b, 0] == 0


def test_scores_are_the_log_probs_of_generation():
    model, params, _ = make("llama")
    result = tx.generate(model, params, jnp.array(ROWS[:1]), max_new_tokens=9)
    whole = jnp.concatenate([jnp.array(ROWS[:1]), result.tokens], axis=1)
    np.testing.assert_allclose(tx.score(model, params, whole)[:, 5:], result.log_probs, atol=1e-4)


def test_the_logits_of_a_whole_text_are_never_there():
    model, params, _ = make("llama")
    text = str(jax.make_jaxpr(lambda tokens: scoring.score.__wrapped__(model, params, tokens))(jnp.ones((1, 24), int)))
    assert re.search(rf"f32\[1,128,{V}\]", text)
    assert not re.search(rf"f32\[1,24,{V}\]", text)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 60), st.integers(2, 24), st.data())
def test_each_token_is_predicted_once_by_the_first_window_that_reaches_it(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    model, params, _ = make("llama")
    ids = np.random.default_rng(length).integers(V, size=length)
    expected, read = [], 1
    for start in range(0, length, stride):
        here = ids[start : start + window]
        if start + len(here) > read:
            padded = jnp.zeros((1, 24), int).at[0, : len(here)].set(here)
            rows = np.asarray(forward(model)(params, padded))
            expected += [rows[i - 1, here[i]] for i in range(read - start, len(here))]
            read = start + len(here)
    found = tx.perplexity(model, params, ids, window=window, stride=stride, batch_size=data.draw(st.integers(1, 3)))
    assert found.n_tokens == len(expected) == length - 1
    np.testing.assert_allclose(found.nats_per_token, -np.mean(expected), rtol=1e-4)
    np.testing.assert_allclose(found.perplexity, np.exp(found.nats_per_token))


def test_without_numbers_a_short_text_is_one_window():
    model, params, _ = make("llama")
    found = tx.perplexity(model, params, ROWS[2])
    np.testing.assert_allclose(
        found.nats_per_token, -tx.score(model, params, jnp.array(ROWS[2:]))[0, 1:].mean(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("ids", "more", "text"),
    [
        ([1], {}, "ids of shape (1,) must be one text of at least two tokens"),
        ([1, V], {}, f"tokens holds id {V}; the vocabulary is 0 … {V - 1}"),
        ([1, 2], {"window": 25}, "window=25 must be from 2 to max_len=24"),
        ([1, 2], {"window": 4, "stride": 4}, "stride=4 must be from 1 to 3, below window=4"),
        ([1, 2], {"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_refused(ids, more, text):
    model, params, _ = make("llama")
    with pytest.raises(InputError, match="^" + re.escape(text)):
        tx.perplexity(model, params, ids, **more)
    with pytest.raises(
        InputError, match=r"^tokens has 25 columns, max_len=24; use `perplexity`, which goes by windows$"
    ):
        tx.score(model, params, np.ones((1, 25), int))
