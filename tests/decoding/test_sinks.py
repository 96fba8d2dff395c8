"""Attention sinks: a text of any length through a cache that does not grow."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tests.test_laws import GPT2, LLAMA, T5, V
from tx_jax.errors import InputError

WINDOW, N = 5, 3
SCHEMES = {
    "rotary": LLAMA,
    "rotary_pairs": replace(LLAMA, positions="rotary_pairs", attention_scale=0.4),
    "alibi": replace(GPT2, positions="alibi"),
    "t5": T5,
    "none": replace(LLAMA, positions="none"),
}


def make(scheme, **more):
    cfg = replace(SCHEMES[scheme], **more)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: tx.init_params(tx.build(cfg), jax.random.key(0)))
    return tx.build(cfg), jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_query_sees_the_first_and_the_last_as_one_short_text(scheme):
    """In a model of one layer, keys are those of their tokens: a plain model of what is kept is the oracle."""
    model, params = make(scheme, n_layers=1, window=WINDOW, n_sinks=N)
    plain = tx.build(replace(model.cfg, window=None, n_sinks=0))
    tokens = jnp.asarray(np.random.default_rng(1).integers(V, size=(2, 20)), jnp.int32)
    found, _ = jax.jit(model.apply)({"params": params}, tokens)
    of_kept = jax.jit(plain.apply)
    for t in (3, N + WINDOW - 1, N + WINDOW, 19):
        kept = [*range(min(N, t + 1)), *range(max(N, t - WINDOW + 1), t + 1)]
        expected, _ = of_kept({"params": params}, tokens[:, jnp.array(kept)])
        np.testing.assert_allclose(found[:, t], expected[:, -1], rtol=1e-4, atol=1e-4)


def test_a_text_beyond_all_slots():
    """Eighty tokens through a cache of 70 slots, which would hold a thousand as well."""
    model, params = make("rotary", window=WINDOW, n_sinks=N, max_len=2000)
    prompt = tx.pad_prompts([[1, 2, 3, 4], [5]])
    out = tx.generate(model, params, *prompt, max_new_tokens=80)
    assert out.cache.positions.shape == (2, WINDOW + N + 64 - 1)
    longer = jax.eval_shape(lambda: tx.generate(model, params, *prompt, max_new_tokens=1000))
    assert longer.cache.positions.shape == out.cache.positions.shape
    assert [sorted(row)[:N] for row in out.cache.positions.tolist()] == [[0, 1, 2]] * 2
    for row, first in enumerate([[1, 2, 3, 4], [5]]):
        whole = jnp.array([[*first, *out.tokens[row].tolist()]])
        logits, _ = model.apply({"params": params}, whole)
        np.testing.assert_array_equal(logits[0, len(first) - 1 : -1].argmax(axis=1), out.tokens[row])


def test_first_tokens_stay_in_fewer_slots():
    model, params = make("rotary", window=WINDOW, n_sinks=N)
    tokens = jnp.asarray(np.random.default_rng(2).integers(V, size=(1, 20)), jnp.int32)
    whole, _ = model.apply({"params": params}, tokens)
    _, cache = model.apply({"params": params}, tokens[:, :17], cache=tx.init_cache(model.cfg, 1, 25))
    small = tx.resize_cache(cache, WINDOW + N + 2, n_sinks=N)
    assert sorted(small.positions[0].tolist()) == [0, 1, 2, *range(10, 17)]
    found, _ = model.apply({"params": params}, tokens[:, 17:], cache=small)
    np.testing.assert_allclose(found, whole[:, 17:], atol=1e-4)


@pytest.mark.parametrize(
    "more", [{}, {"window": 4, "window_pattern": "wf"}, {"window": 4, "positions": "learned"},
             {"window": 4, "attention_soft_cap": 5.0}]
)  # fmt: skip
def test_refused(more):
    with pytest.raises(InputError, match=r"^n_sinks=2 needs a window in every layer, no attention_soft_cap"):
        replace(LLAMA, n_sinks=2, **more)


def test_training_takes_no_array_of_all_pairs():
    """What attention without a window takes, which is linear."""

    def needed(window, n_sinks):
        model, params = make("rotary", n_layers=2, window=window, n_sinks=n_sinks)
        loss = jax.jit(jax.grad(lambda params, tokens: model.apply({"params": params}, tokens)[0].sum()))
        return loss.lower(params, jnp.zeros((1, 1024), jnp.int32)).compile().memory_analysis().temp_size_in_bytes

    assert needed(WINDOW, N) < 1.3 * needed(None, 0)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_in_bfloat16(dtype):
    """Through a cache, too; near what float32 gives."""
    model, params = make("rotary", window=WINDOW, n_sinks=N)
    half = tx.build(replace(model.cfg, dtype="bfloat16"))
    tokens = jnp.asarray(np.random.default_rng(1).integers(V, size=(2, 20)), jnp.int32)
    expected, _ = model.apply({"params": params}, tokens)
    found, cache = [], tx.init_cache(half.cfg, 2, 20, dtype)
    for start in range(0, 20, 5):
        logits, cache = half.apply({"params": params}, tokens[:, start : start + 5], cache=cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=0.1 * np.abs(expected).max())
