"""Each rule of a sampler keeps the set that its definition says, and tokens are drawn by what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tx_jax import InputError, Sampler, sample
from tx_jax.decoding.rules import keep_min_p, keep_top_k, keep_top_p
from tx_jax.decoding.samplers import check_sampler

V = 7
LOGITS = hnp.arrays(np.float32, (2, V), elements=st.integers(-40, 40).map(lambda n: n / 8))  # so that ties are common
RULES = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}
NEAR = 1e-5  # probabilities nearer than this may fall on either side of a border: float32 here, float64 there
jitted = {name: jax.jit(rule) for name, rule in RULES.items()}
draw = jax.jit(sample)


def kept_by(rule, logits, number):
    out = np.asarray(jitted[rule](logits, number))
    kept = out > -np.inf
    np.testing.assert_array_equal(out[kept], logits[kept])
    return kept


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@settings(deadline=None)  # a slow machine is no error
@given(LOGITS, st.integers(1, V + 3))
def test_top_k_keeps_what_fewer_than_k_exceed(logits, k):
    exceeded_by = (logits[:, None, :] > logits[:, :, None]).sum(-1)
    np.testing.assert_array_equal(kept_by("top_k", logits, k), exceeded_by < k)


@settings(deadline=None)
@given(LOGITS, st.floats(1 / 1024, 1, width=32))
def test_top_p_keeps_what_less_than_p_exceeds(logits, p):
    """The likeliest whose probabilities first reach p are those before which there is less than p."""
    shares = softmax(logits)
    before = np.where(logits[:, None, :] > logits[:, :, None], shares[:, None, :], 0).sum(-1)
    kept = kept_by("top_p", logits, p)
    assert kept[before < p - NEAR].all()
    assert (p == 1) or not kept[before > p + NEAR].any()
    assert kept[logits == logits.max(-1, keepdims=True)].all()


@settings(deadline=None)
@given(LOGITS, st.floats(0, 1, width=32))
def test_min_p_keeps_what_is_p_times_as_likely_as_the_likeliest(logits, p):
    ratio, kept = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True)), kept_by("min_p", logits, p)
    assert kept[ratio > p * (1 + NEAR)].all()
    assert not kept[ratio < p * (1 - NEAR)].any()


@settings(deadline=None)
@given(LOGITS)
def test_the_largest_numbers_change_nothing(logits):
    for rule, number in {"top_k": float(V), "top_p": 1.0, "min_p": 0.0}.items():
        assert kept_by(rule, logits, number).all()


@settings(deadline=None)
@given(LOGITS, st.integers(0, 99))
def test_greedy_is_top_1_is_the_likeliest(logits, seed):
    best = logits.argmax(-1)
    np.testing.assert_array_equal(draw(logits, Sampler()), best)
    token = np.asarray(draw(logits, Sampler(temperature=3.0, top_k=1), jax.random.key(seed)))
    np.testing.assert_array_equal(np.take_along_axis(logits, token[:, None], 1)[:, 0], logits.max(-1))  # ties are drawn


ROW = np.array([1.1, -0.3, 2.0, 0.4, 1.7, -2.0, 0.0], np.float32)
DRAWN = {  # of ROW: probability ∝ exp(2.0), exp(1.7), exp(1.1), … by temperature, of the ids that are left
    Sampler(temperature=1.0): range(V),
    Sampler(temperature=0.5): range(V),
    Sampler(temperature=1.0, top_k=3): [2, 4, 0],
    Sampler(temperature=2.0, top_p=0.5): [2, 4, 0],  # 0.26, 0.22, 0.17: two have 0.48
    Sampler(temperature=1.0, top_p=0.5): [2, 4],  # 0.38, 0.28: the temperature comes first
    Sampler(temperature=1.0, top_k=2, top_p=0.5): [2],  # 0.57 of the two that top_k left: top_k comes before top_p
    Sampler(temperature=1.0, min_p=0.3): [2, 4, 0],  # at least 0.3 · 0.38; 0.4 has 0.20
    Sampler(temperature=2.0, min_p=0.3): [2, 4, 0, 3, 6, 1],  # at least 0.3 · 0.26
}


@pytest.mark.parametrize("sampler", DRAWN, ids=str)
def test_tokens_are_drawn_by_the_probabilities_that_are_left(sampler):
    n, left = 20_000, np.isin(np.arange(V), list(DRAWN[sampler]))
    tokens = draw(jnp.broadcast_to(ROW, (n, V)), sampler, jax.random.key(0))
    expected = softmax(np.where(left, ROW / sampler.temperature, -np.inf))
    found = np.bincount(tokens, minlength=V) / n
    assert not found[~left].any()
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 0.5 / n**0.5)  # four standard deviations


def test_a_token_is_a_function_of_the_key():
    logits, sampler = jnp.zeros((50, V)), Sampler(temperature=1.0)
    one, again, other = (np.asarray(draw(logits, sampler, jax.random.key(seed))) for seed in (0, 0, 1))
    assert one.dtype == np.int32
    assert (one == again).all()
    assert (one != other).any()


def test_a_new_number_compiles_nothing():
    compiled = jax.jit(lambda logits, sampler, key: sample(logits, sampler, key))
    for t, k, p, least in ((0.5, 3, 0.9, 0.1), (2.0, 5, 0.2, 0.7)):
        compiled(jnp.zeros((2, V)), Sampler(temperature=t, top_k=k, top_p=p, min_p=least), jax.random.key(0))
    assert compiled._cache_size() == 1


REFUSED = {
    Sampler(temperature=-1): r"^temperature=-1 must be at least 0, which is greedy, and finite$",
    Sampler(temperature=float("nan")): r"^temperature=nan must be at least 0, which is greedy, and finite$",
    Sampler(temperature=1.0, top_k=1.5): r"^top_k=1.5 must be a whole number, at least 1; leave it out",
    Sampler(
        temperature=1.0, top_k=0
    ): r"^top_k=0 must be a whole number, at least 1; leave it out \(None\) to keep all$",
    Sampler(temperature=1.0, top_p=0.0): r"^top_p=0.0 must be in \(0, 1\]; leave it out \(None\) to keep all$",
    Sampler(temperature=1.0, top_p=1.5): r"^top_p=1.5 must be in \(0, 1\]",
    Sampler(temperature=1.0, min_p=-0.1): r"^min_p=-0.1 must be in \[0, 1\]; leave it out \(None\) to keep all$",
    Sampler(temperature=1.0, min_p=1.1): r"^min_p=1.1 must be in \[0, 1\]",
}


def test_one_number_for_all_rows_or_one_for_each():
    with pytest.raises(InputError, match=r"^top_k=\[1 2 3\] must be one number for all rows, or one for each of 2$"):
        check_sampler(Sampler(temperature=1.0, top_k=jnp.array([1, 2, 3])), n_rows=2)
    with pytest.raises(InputError, match=r"^top_p=-1.0 must be in \(0, 1\]"):
        check_sampler(Sampler(temperature=1.0, top_p=np.float32(-1)))


@pytest.mark.parametrize("sampler", REFUSED, ids=str)
def test_refused_numbers(sampler):
    with pytest.raises(InputError, match=REFUSED[sampler]):
        check_sampler(sampler)


def test_numbers_at_their_bounds_are_allowed():
    check_sampler(Sampler())
    check_sampler(Sampler(temperature=1e-3, top_k=1, top_p=1.0, min_p=0.0))
    check_sampler(Sampler(temperature=1.0, min_p=1.0))
