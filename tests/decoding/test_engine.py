"""A text is what its prompt alone gives, whatever stands in the other rows and whenever its turn comes."""

import functools
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import InputError, Sampler
from tx_jax.decoding import engine

V = 11
CFG = tx.ModelConfig(vocab_size=V, n_layers=2, n_heads=4, d_head=6, d_model=30, max_len=64, n_kv_heads=2)
CONFIGS = {"llama": replace(CFG, positions="rotary", norm="rmsnorm"), "mistral": replace(CFG, window=3)}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(V, size=RNG.integers(1, 9)).tolist() for _ in range(11)]
LIMITS = RNG.integers(1, 25, size=11).tolist()


@functools.cache
def make(name):
    model = tx.build(CONFIGS[name])
    params = tx.init_params(model, jax.random.key(1))
    return model, jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 20 * leaf, params)


@functools.cache
def alone(name, i, sampler):
    model, params = make(name)
    key = jax.random.fold_in(jax.random.key(5), i)[None]
    out = tx.generate(model, params, np.array([PROMPTS[i]]), max_new_tokens=24, sampler=sampler, key=key, eos_id=(3, 4))
    n = min(int(out.lengths[0]), LIMITS[i])
    return np.asarray(out.tokens[0, :n]), np.asarray(out.log_probs[0, :n])


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.3, repetition_penalty=1.2, top_k=7)])
@pytest.mark.parametrize("n_rows", [1, 4, 9, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_text_is_that_of_its_prompt_alone(name, n_rows, sampler):
    model, params = make(name)
    more = {"max_new_tokens": LIMITS, "sampler": sampler, "key": jax.random.key(5), "eos_id": (3, 4)}
    found = {one.number: one for one in tx.write_all(model, params, PROMPTS, n_rows=n_rows, **more)}
    assert sorted(found) == [*range(11)]
    for i, one in found.items():
        tokens, log_probs = alone(name, i, sampler)
        np.testing.assert_array_equal(one.tokens, tokens)
        np.testing.assert_allclose(one.log_probs, log_probs, atol=2e-3)


def test_the_rest_of_a_list_is_written_as_with_the_whole():
    model, params = make("llama")
    more = {"sampler": Sampler(temperature=1.3), "key": jax.random.key(5), "n_rows": 2}
    whole = {one.number: one.tokens.tolist() for one in tx.write_all(model, params, PROMPTS, max_new_tokens=9, **more)}
    rest = tx.write_all(model, params, PROMPTS[6:], max_new_tokens=9, first=6, **more)
    assert {one.number: one.tokens.tolist() for one in rest} == {i: whole[i] for i in range(6, 11)}


def test_an_early_end_frees_its_row(monkeypatch):
    """Sixteen short texts pass through one row while a long one is written in the other."""
    model, params = make("llama")
    steps, run = [], engine._run

    def counted(model, params, writing, *more):
        before = int(writing.text.n_tokens.max())
        out = run(model, params, writing, *more)
        steps.append(int(out.text.n_tokens.max()) - before)
        return out

    monkeypatch.setattr(engine, "_run", counted)
    found = [*tx.write_all(model, params, [[1]] * 17, max_new_tokens=[40] + [3] * 16, n_rows=2)]
    assert found[-1].number == 0
    assert [one.number for one in found[:-1]] == [*range(1, 17)]
    assert sum(steps) == 39  # of the long one: the others cost no step of their own


def test_stops_and_no_prompts():
    model, params = make("llama")
    machine = tx.stop_at(["b"], [b"a", b"b"] + [b"c"] * 9)
    for one in tx.write_all(model, params, PROMPTS, max_new_tokens=20, automaton=machine):
        assert 1 not in one.tokens[:-1].tolist()
        assert one.tokens[-1] == 1 or len(one.tokens) == 20
    assert [*tx.write_all(model, params, [], max_new_tokens=2)] == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"n_rows": 0}, "n_rows=0 must be at least 1"),
        ({"max_new_tokens": [1]}, "max_new_tokens holds 1 numbers for 2 prompts"),
        ({"max_new_tokens": [1, 0]}, "max_new_tokens=0 of prompt 1 must be at least 1"),
        ({"max_new_tokens": 64}, "prompt 0 has 1 tokens and max_new_tokens=64, max_len=64; shorten one"),
        ({"prompts": [[1], []]}, "prompt 1 has no token; a model goes on from at least one"),
        ({"prompts": [[1], [V]]}, f"prompt 1 holds id {V}; the vocabulary is 0 … {V - 1}"),
        ({"sampler": Sampler(temperature=1.0)}, "sampling needs key=jax.random.key(seed)"),
        ({"eos_id": 99}, "eos_id=99 must be from 0 to "),
        ({"sampler": Sampler(min_new_tokens=2)}, "min_new_tokens=2 needs an eos_id; give one"),
    ],
)
def test_refused(more, text):
    model, params = make("llama")
    with pytest.raises(InputError, match="^" + re.escape(text)):
        tx.write_all(model, params, **{"prompts": [[1], [2]], "max_new_tokens": 4} | more)
