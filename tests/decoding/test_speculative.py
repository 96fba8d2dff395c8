"""Speculation is `generate`: the same greedy texts, the same distribution of drawn ones, in fewer passes."""

import functools
import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import tx_jax as tx
from tx_jax import InputError, Sampler
from tx_jax.decoding import speculative
from tx_jax.decoding.rules import begin_text
from tx_jax.decoding.samplers import probabilities
from tx_jax.decoding.speculative import look_up

V, NEW = 11, 30
CFG = tx.ModelConfig(vocab_size=V, n_layers=2, n_heads=4, d_head=6, d_model=30, max_len=64, n_kv_heads=2)
CONFIGS = {
    "llama": replace(CFG, positions="rotary", mlp="swiglu", norm="rmsnorm"),
    "gpt2": replace(CFG, positions="learned"),
    "mistral": replace(CFG, positions="rotary", window=3),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 10]]


@functools.cache
def make(name, seed=1, heat=20.0):
    model = tx.build(CONFIGS[name])
    params = tx.init_params(model, jax.random.key(seed))
    return model, jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else heat * leaf, params)


@functools.cache
def drafts(name):
    """None; another model; a like one, whose parameters are a little off; and the model itself."""
    model, params = make(name)
    off = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(9), leaf.shape), params)
    return {"look-up": None, "other": make("gpt2", 2), "like": (model, off), "itself": (model, params)}


@pytest.mark.parametrize("n_draft", [1, 4])
@pytest.mark.parametrize("draft", ["look-up", "other", "like", "itself"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_texts_are_the_same(name, draft, n_draft):
    model, params = make(name)
    more = {"max_new_tokens": NEW, "eos_id": (6, 8)}
    expected = tx.generate(model, params, *tx.pad_prompts(PROMPTS), **more)
    found = tx.speculate(model, params, *tx.pad_prompts(PROMPTS), draft=drafts(name)[draft], n_draft=n_draft, **more)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-3)
    longest = int(expected.lengths.max())
    assert int(found.n_passes) <= longest - 1
    if draft == "itself":
        assert int(found.n_passes) <= -(-(longest - 1) // (n_draft + 1)) + 1


@pytest.mark.parametrize("draft", ["look-up", "like"])
def test_rules_see_what_was_accepted(draft):
    model, params = make("llama")
    rules = Sampler(repetition_penalty=1.3, no_repeat_ngram=2, min_new_tokens=12, forbidden=[4])
    more = {"max_new_tokens": NEW, "eos_id": 6, "sampler": rules}
    expected = tx.generate(model, params, *tx.pad_prompts(PROMPTS), **more)
    found = tx.speculate(model, params, *tx.pad_prompts(PROMPTS), draft=drafts("llama")[draft], n_draft=4, **more)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_text_fills_the_context():
    """Proposals beyond the last position are none."""
    model, params = make("gpt2")
    prompt = np.array([PROMPTS[0]])
    expected = tx.generate(model, params, prompt, max_new_tokens=59).tokens
    for draft in (None, drafts("gpt2")["itself"]):
        found = tx.speculate(model, params, prompt, max_new_tokens=59, draft=draft, n_draft=7)
        np.testing.assert_array_equal(found.tokens, expected)


SMALL = 3


@pytest.mark.parametrize("draft", ["look-up", "other"])
@pytest.mark.parametrize(
    "sampler", [Sampler(temperature=1.0), Sampler(temperature=0.7, top_p=0.8, presence_penalty=0.4)]
)
def test_drawn_texts_keep_their_distribution(draft, sampler):
    """χ² of the texts of three tokens over a vocabulary of three, beside the exact probabilities; and rows differ."""
    cfg = tx.ModelConfig(vocab_size=SMALL, n_layers=1, n_heads=2, d_model=8, max_len=16)
    model, other = tx.build(cfg), tx.build(replace(cfg, d_model=12, positions="learned"))
    params, others = (
        jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 6 * leaf, tx.init_params(m, jax.random.key(i)))
        for i, m in enumerate((model, other))
    )
    prompt, n = [0, 1, 2, 0, 1], 6000
    helper = None if draft == "look-up" else (other, others)
    found = tx.speculate(
        model, params, jnp.tile(jnp.array(prompt), (n, 1)), max_new_tokens=3, draft=helper, n_draft=2,
        sampler=sampler, key=jax.random.key(8),
    )  # fmt: skip
    counts = np.bincount(np.asarray(found.tokens) @ [9, 3, 1], minlength=27)
    expected = np.ones(27)
    for i, text in enumerate(itertools.product(range(SMALL), repeat=3)):
        for j in range(3):
            so_far = jnp.array([[*prompt, *text[:j]]])
            seen = begin_text(jnp.array([prompt]), jnp.arange(5)[None], 3)
            for token in text[:j]:
                seen = seen.write(jnp.array([token]), jnp.zeros(1, bool))
            logits = model.apply({"params": params}, so_far)[0][:, -1]
            expected[i] *= float(probabilities(logits, sampler, seen)[0, text[j]])
    there = expected > 0
    assert not counts[~there].any()
    assert stats.chisquare(counts[there], expected[there] * n / expected.sum()).pvalue > 1e-3
    assert abs(expected.sum() - 1) < 1e-4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the latest
        ([5, 1, 2, 3, 1, 2, 4, 5, 1, 2], [3, 1, 2]),  # the longest
        ([1, 2, 3], [-1, -1, -1]),
        ([7, 7, 7], [7, -1, -1]),
        ([7, 1, 2, 7], [-1, -1, -1]),  # one that agrees is too few
        ([7], [-1, -1, -1]),
    ],
)
def test_look_up(given, expected):
    text = begin_text(jnp.array([[*given, 0, 0]]), jnp.array([[*range(len(given)), -1, -1]]), 3)
    assert look_up(text, 3).tolist() == [expected]


def test_repeating_texts_take_few_passes():
    """Greedy texts of a small model soon run in a circle, which look-up finds."""
    model, params = make("llama")
    prompt = np.array([PROMPTS[0]])
    found = tx.speculate(model, params, prompt, max_new_tokens=59, n_draft=8)
    assert int(found.n_passes) < 40


def test_a_second_prompt_of_the_bucket_compiles_nothing():
    model, params = make("llama")
    for length in (3, 9):
        tx.speculate(model, params, np.ones((1, length), np.int32), max_new_tokens=5)
    before = speculative._speculate._cache_size()
    tx.speculate(model, params, np.ones((1, 17), np.int32), max_new_tokens=5)
    assert speculative._speculate._cache_size() == before


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"n_draft": 0}, "n_draft=0 must be at least 1; without a draft, use generate"),
        ({"draft": (tx.build(replace(CFG, vocab_size=12)), {})}, "the draft has 12 tokens, the model 11; they must be"),
        (
            {"draft": (tx.build(replace(CFG, max_len=9)), {})},
            "the draft has max_len=9, the model 64; it must reach as far",
        ),
        ({"draft": tx.build(CFG)}, "draft=DecoderLM must be two: a model and its parameters"),
        ({"eos_id": V}, f"eos_id={V} must be from 0 to {V - 1}"),
        ({"sampler": Sampler(temperature=1.0)}, "sampling needs key=jax.random.key(seed)"),
        ({"max_new_tokens": 64}, "a prompt of 3 tokens and max_new_tokens=64 exceed max_len=64"),
    ],
)
def test_refused(more, text):
    model, params = make("llama")
    with pytest.raises(InputError, match="^" + re.escape(text)):
        tx.speculate.__wrapped__(model, params, np.ones((1, 3), np.int32), **{"max_new_tokens": 4} | more)
