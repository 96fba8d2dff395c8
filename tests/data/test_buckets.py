"""Buckets: every pair once an epoch, in batches of few shapes and no more tokens than asked for, resumed exactly."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_jax.data.buckets import make_buckets, train_pair_batches, valid_pair_batches

START, SEQ_LEN, BATCH = 99, 24, 4
lengths = st.lists(st.tuples(st.integers(1, SEQ_LEN), st.integers(1, SEQ_LEN)), min_size=1, max_size=80)


def make(lengths):
    """Pairs whose ids say which pair they are, and where in it."""
    sources = [1000 * (i + 1) + np.arange(n) for i, (n, _) in enumerate(lengths)]
    targets = [1000 * (i + 1) + 500 + np.arange(n) for i, (_, n) in enumerate(lengths)]
    return {"sources": sources, "targets": targets}


def unpack(batch):
    """The pairs of a batch, held to its conventions."""
    for ids, positions in ((batch.source, batch.source_positions), (batch.targets, batch.positions)):
        n = (positions >= 0).sum(axis=1, keepdims=True)
        index = np.arange(ids.shape[1])
        np.testing.assert_array_equal(positions, np.where(index < n, index, -1))
        assert (ids[positions < 0] == 0).all()
    np.testing.assert_array_equal(batch.weights, batch.positions >= 0)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert (batch.tokens[:, 0] == START).all()
    rows = zip(batch.source, batch.source_positions, batch.targets, batch.positions, strict=True)
    return [(tuple(s[p >= 0]), tuple(t[q >= 0])) for s, p, t, q in rows if p[0] == 0]


@given(lengths)
@settings(deadline=None)
def test_every_pair_is_in_one_bucket_that_holds_it(lengths):
    pairs = make(lengths)
    buckets = make_buckets(**pairs, seq_len=SEQ_LEN, batch_size=BATCH)
    assert sorted(i for bucket in buckets for i in bucket.members) == list(range(len(lengths)))
    for bucket in buckets:
        assert bucket.n_rows % BATCH == 0
        longest = np.array(lengths)[bucket.members].max(axis=0)
        assert (longest <= [bucket.source_len, bucket.target_len]).all()
        assert bucket.n_rows * max(bucket.source_len, bucket.target_len) <= BATCH * SEQ_LEN
    assert all(len(bucket.members) >= bucket.n_rows for bucket in buckets[:-1])  # or it would have joined the next


@given(lengths, st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_an_epoch_has_every_pair_once_and_the_next_another_order(lengths, seed):
    pairs = make(lengths)
    shape = {"seq_len": SEQ_LEN, "batch_size": BATCH, "start_id": START}
    expected = sorted((tuple(s), tuple(t)) for s, t in zip(*pairs.values(), strict=True))
    held_out = valid_pair_batches(**pairs, **shape)
    assert sorted(pair for batch in held_out for pair in unpack(batch)) == expected
    batches = iter(train_pair_batches(**pairs, **shape, seed=seed))
    for _ in range(2):
        epoch = list(itertools.islice(batches, len(held_out)))
        assert sorted(pair for batch in epoch for pair in unpack(batch)) == expected


def test_the_order_is_the_seeds_and_an_iterator_resumes():
    pairs = make(np.random.default_rng(0).integers(1, SEQ_LEN, (70, 2)))

    def start(seed):
        return iter(train_pair_batches(**pairs, seq_len=SEQ_LEN, batch_size=BATCH, start_id=START, seed=seed))

    def take(batches, n):
        return [unpack(next(batches)) for _ in range(n)]

    one, again, other = start(0), start(0), start(1)
    first = take(one, 40)
    assert first == take(again, 40)
    assert first != take(other, 40)
    assert first[:20] != first[20:]
    resumed, middle = start(0), start(0)
    take(middle, 17)
    resumed.set_state(middle.get_state())
    assert take(resumed, 23) == first[17:]


def test_most_of_a_batch_is_text():
    """Lengths as those of Tatoeba: at least three quarters of what is computed is tokens."""
    rng = np.random.default_rng(0)
    n = np.clip(rng.gamma(6, 1.6, 5000), 2, 60).astype(int)
    pairs = make(np.stack([n, np.clip(n + rng.integers(-2, 3, n.shape), 1, 64)], axis=1))
    batches = valid_pair_batches(**pairs, seq_len=64, batch_size=16, start_id=START)
    filled = sum(batch.n_tokens for batch in batches) / sum(batch.tokens.size for batch in batches)
    assert filled > 0.75
    assert len({batch.tokens.shape for batch in batches}) <= 8
    assert batches[0].n_tokens == pytest.approx(batches[0].weights.sum())
