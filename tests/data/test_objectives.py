"""Objectives: the text can be had back, what is counted, what may be seen, determinism, and every error."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tx_jax as tx
from tx_jax.data.objectives import mask_tokens, next_token, pair_lengths, prefix_lm, span_corruption, span_lengths
from tx_jax.errors import InputError

START, EOS, MASK, V, MORE = 50, 51, 52, 200, 60  # ids of text are below 50, sentinels from MORE on
SENTINELS = range(V - 1, MORE, -1)  # T5's go down, too
OBJECTIVES = {
    "next token": next_token,
    "prefix": prefix_lm,
    "mask": functools.partial(mask_tokens, mask_id=MASK, ids_below=50),
    "spans": functools.partial(span_corruption, sentinels=SENTINELS, start_id=START, eos_id=EOS),
}
drawn = settings(deadline=None)  # a slow machine is no error


def draw_windows(B, T, seed=0, below=50, dtype=np.int64):
    return np.random.default_rng(seed).integers(below, size=(B, T + 1)).astype(dtype)


def make(name, windows, seed=0, **more):
    return OBJECTIVES[name](windows, np.random.default_rng(seed), **more)


def arrays(batch):
    return {name: value for name, value in batch._asdict().items() if value is not None}


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_types_and_a_batch_that_the_generator_alone_decides(name, dtype):
    windows = draw_windows(4, 40, dtype=dtype)
    before = windows.copy()
    one, again, other = (arrays(make(name, windows, seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(windows, before)
    assert {array.dtype for key, array in one.items() if key != "weights"} == {np.dtype(np.int32)}
    assert one["weights"].dtype == np.float32
    assert [*map(np.shape, one.values())] == [*map(np.shape, other.values())]
    for key, array in one.items():
        np.testing.assert_array_equal(array, again[key])
    equal = all((array == other[key]).all() for key, array in one.items())
    assert equal == (name == "next token")


def test_next_tokens_are_the_next():
    batch = make("next token", np.arange(12).reshape(2, 6))
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
    assert (batch.weights == 1).all()
    assert batch.prefix is None


def spans_of(row):
    """What stands behind each sentinel of a row of targets, and the row's end."""
    found, (*body, end) = {}, row
    for token in body:
        if token >= MORE:
            assert token not in found
            found[token] = []
        else:
            found[next(reversed(found))].append(token)
    return found, end


@drawn
@given(
    T=st.integers(2, 60), density=st.floats(0.01, 0.5), mean_span=st.floats(1.5, 8), seed=st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_a_text_is_its_source_with_its_targets(T, density, mean_span, seed):
    windows, numbers = draw_windows(3, T, seed), {"noise_density": density, "mean_span": mean_span}
    batch, (n_noise, n_spans) = make("spans", windows, seed, **numbers), span_lengths(T, *numbers.values())
    assert 1 <= n_spans <= n_noise < T
    assert (batch.source.shape[1], batch.targets.shape[1]) == pair_lengths(T, *numbers.values())
    assert (batch.weights == 1).all()
    np.testing.assert_array_equal(batch.tokens, np.insert(batch.targets[:, :-1], 0, START, axis=1))
    for text, source, targets in zip(windows[:, :T], batch.source, batch.targets, strict=True):
        spans, end = spans_of(targets)
        assert (end, source[-1]) == (EOS, EOS)
        assert [*spans] == [token for token in source if token >= MORE] == [*SENTINELS][:n_spans]
        assert sum(map(len, spans.values())) == n_noise
        assert all(spans.values())
        kept = source[:-1] < MORE
        assert kept[0]
        assert (kept[1:] | kept[:-1]).all()  # no two spans touch
        restored = [[token] if token < MORE else spans[token] for token in source[:-1]]
        np.testing.assert_array_equal([*itertools.chain(*restored)], text)


def test_the_example_of_the_docstring():
    """a kept, b hidden, c d kept, e f hidden is one of 4 ways, and among 100 rows."""
    batch = make("spans", np.tile(np.arange(1, 8), (100, 1)), noise_density=0.5, mean_span=1.5)
    row = batch.targets.tolist().index([199, 2, 198, 5, 6, EOS])
    assert batch.source[row].tolist() == [1, 199, 3, 4, 198, EOS]
    assert batch.tokens[row].tolist() == [START, 199, 2, 198, 5, 6]


def test_all_ways_to_cut_are_as_likely():
    n = 6000  # of 4 hidden tokens in two spans, 3 ways; of 8 kept ones, 7
    batch = make("spans", draw_windows(n, 12), noise_density=0.34, mean_span=2.0)
    hidden = collections.Counter(tuple(map(len, spans_of(row)[0].values())) for row in batch.targets)
    kept = collections.Counter(int(np.flatnonzero(row >= MORE)[0]) for row in batch.source)
    assert sorted(hidden) == [(1, 3), (2, 2), (3, 1)]
    assert sorted(kept) == [1, 2, 3, 4, 5, 6, 7]
    for counts in (hidden, kept):
        share = 1 / len(counts)
        assert max(abs(count / n - share) for count in counts.values()) < 4 * (share * (1 - share) / n) ** 0.5


@pytest.mark.parametrize(("T", "numbers", "expected"), [
    (512, (), (77, 26)),  # of T5's code: 26 spans, 77 tokens
    (2, (), (1, 1)),
    (10, (0.99, 9.0), (9, 1)),
    (100, (0.5, 1.0), (50, 50)),
])  # fmt: skip
def test_numbers_of_spans(T, numbers, expected):
    assert span_lengths(T, *numbers) == expected


@drawn
@given(B=st.integers(1, 5), T=st.integers(1, 40), rate=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_masking_counts_what_it_chooses_and_changes_nothing_else(B, T, rate, seed):
    windows = draw_windows(B, T, seed)
    batch = make("mask", windows, seed, rate=rate)
    np.testing.assert_array_equal(batch.targets, windows[:, :T])
    assert set(np.unique(batch.weights)) <= {0, 1}
    assert (batch.weights.sum(1) == max(round(rate * T), 1)).all()
    left = batch.weights == 0
    np.testing.assert_array_equal(batch.tokens[left], windows[:, :T][left])


def test_of_the_chosen_eight_tenths_are_masked_one_is_another_and_one_stays():
    B, T, n = 2000, 100, 2000 * 15
    batch = make("mask", draw_windows(B, T), ids_below=10**6)
    chosen, counts = batch.weights == 1, batch.weights.sum(0)
    assert chosen.sum() == n
    masked, same = batch.tokens == MASK, batch.tokens == batch.targets
    for share, found in ((0.8, masked), (0.1, chosen & ~masked & ~same), (0.1, chosen & same)):
        assert abs(found.sum() / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert abs(counts - B * 0.15).max() < 4 * (B * 0.15 * 0.85) ** 0.5  # each position as likely


@pytest.mark.parametrize(("mask_id", "others"), [(3, {0, 1, 2, 4, 5, 6}), (0, {1, 2, 3, 4, 5, 6}), (7, set(range(7)))])
def test_another_id_is_any_but_the_mask(mask_id, others):
    batch = make("mask", draw_windows(200, 50) + 100, mask_id=mask_id, ids_below=7)
    changed = batch.tokens[(batch.tokens != batch.targets) & (batch.tokens != mask_id)]
    ids, counts = np.unique(changed, return_counts=True)
    assert {*ids} == others
    share = 1 / len(others)
    assert abs(counts / len(changed) - share).max() < 4 * (share / len(changed)) ** 0.5


@drawn
@given(B=st.integers(1, 5), T=st.integers(2, 40), seed=st.integers(0, 2**32 - 1))
def test_a_prefix_is_not_counted_and_all_that_follows_is(B, T, seed):
    windows = draw_windows(B, T, seed)
    batch = make("prefix", windows, seed)
    np.testing.assert_array_equal(batch.tokens, windows[:, :-1])
    for row, p in enumerate(batch.prefix):
        assert 1 <= p <= T - 1
        np.testing.assert_array_equal(batch.targets[row][batch.weights[row] == 1], windows[row, p:])
        np.testing.assert_array_equal(batch.targets[row], windows[row, 1:])


def test_all_lengths_of_a_prefix_are_as_likely():
    lengths, counts = np.unique(make("prefix", draw_windows(4000, 5)).prefix, return_counts=True)
    assert lengths.tolist() == [1, 2, 3, 4]
    assert abs(counts - 1000).max() < 4 * (4000 / 4 * 3 / 4) ** 0.5


CFG = tx.ModelConfig(vocab_size=V, max_len=64, d_model=12, n_heads=2, n_layers=2, d_mlp=16)


@functools.cache
def model_of(stack):
    model = tx.build(dataclasses.replace(CFG, stack=stack))
    return model, tx.init_params(model, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def logits(model, params, inputs):
    return model.apply({"params": params}, **inputs)[0]


STACKS = {"next token": "decoder", "prefix": "decoder", "mask": "encoder", "spans": "encoder_decoder"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_model_reads_it(name):
    batch = make(name, draw_windows(2, 16))
    found = logits(*model_of(STACKS[name]), batch.inputs)
    assert found.shape == (*batch.targets.shape, V)
    total, count = tx.cross_entropy(found, jnp.asarray(batch.targets), jnp.asarray(batch.weights))
    assert np.isfinite(total)
    assert count == batch.weights.sum()


@pytest.mark.parametrize("name", ["next token", "prefix"])
def test_a_prefix_sees_itself_and_no_query_sees_its_target(name):
    """Row u of a batch of T equal windows has another token u; the logits that differ are of queries that see it."""
    T = 9
    for seed in range(4):
        batch = make(name, draw_windows(1, T, seed), seed)
        same = jax.tree.map(lambda array: np.repeat(array, T, axis=0), batch)
        other = same._replace(tokens=np.where(np.eye(T, dtype=bool), same.tokens + 60, same.tokens))
        one, two = (np.asarray(logits(*model_of("decoder"), each.inputs)) for each in (same, other))
        sees = (one != two).any(-1).T  # (t, u)
        t, u = np.arange(T)[:, None], np.arange(T)
        p = 0 if batch.prefix is None else int(batch.prefix[0])
        np.testing.assert_array_equal(sees, (u <= t) | (u < p))
        assert sees[:p, :p].all()
        for query in np.flatnonzero(batch.weights[0][:-1]):  # its target is the token after it
            assert not sees[query, query + 1 :].any()


TEN = np.arange(11)[None]
ERRORS = [
    ("prefix", TEN[:, :2], {}, "windows of 2 ids have T=1, but T must be at least 2; raise --data.seq-len"),
    ("mask", TEN[:, :1], {}, "windows of 1 ids have T=0, but T must be at least 1; raise --data.seq-len"),
    ("mask", TEN, {"rate": 0.0}, "rate=0.0 must be between 0 and 1; BERT's is 0.15"),
    ("mask", TEN, {"rate": 1.0}, "rate=1.0 must be between 0 and 1; BERT's is 0.15"),
    ("mask", TEN, {"ids_below": 0}, "ids_below=0 leaves no id but mask_id=52; give the vocabulary's size"),
    ("mask", TEN, {"ids_below": 1, "mask_id": 0}, "ids_below=1 leaves no id but mask_id=0; give the vocabulary's size"),
    ("spans", TEN[:, :2], {}, "T=1 must be at least 2, a token to hide and one to keep; raise --data.seq-len"),
    ("spans", TEN, {"noise_density": 0.0}, "noise_density=0.0 must be between 0 and 1; T5's is 0.15"),
    ("spans", TEN, {"noise_density": 1.0}, "noise_density=1.0 must be between 0 and 1; T5's is 0.15"),
    ("spans", TEN, {"mean_span": 0.5}, "mean_span=0.5 must be at least 1 token; T5's is 3"),
    (
        "spans",
        TEN,
        {"noise_density": 0.7, "mean_span": 1.0},
        "noise_density=0.7 keeps 3 of 10 tokens, too few between 7 spans; lower it, or raise mean_span=1.0",
    ),
    (
        "spans",
        TEN,
        {"noise_density": 0.5, "mean_span": 1.0, "sentinels": [60, 61]},
        "2 sentinels are fewer than the 5 spans of T=10; give 5, or raise mean_span=1.0",
    ),
]


@pytest.mark.parametrize(("name", "windows", "more", "text"), ERRORS)
def test_refused(name, windows, more, text):
    with pytest.raises(InputError) as caught:
        make(name, windows, **more)
    assert str(caught.value) == text
