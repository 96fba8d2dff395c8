"""Batches: what they hold, that each token comes once, that they resume, and every error."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_jax.data.batches import Batch, split, train_batches, valid_batches
from tx_jax.errors import InputError

MAKERS = {"training": lambda ids, **sizes: train_batches(ids, seed=0, **sizes), "validation": valid_batches}


def assert_equal(left, right):
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def take(n, ids, seed=0, **sizes):
    return list(itertools.islice(train_batches(ids, seed=seed, **sizes), n))


def test_inputs_are_what_a_model_is_called_with():
    tokens = np.zeros((2, 3), np.int32)
    batch = Batch(tokens, tokens, np.ones((2, 3), np.float32), segments=tokens)
    assert batch.inputs == {"tokens": tokens, "positions": None, "segments": tokens}


def test_split_is_that_of_nanogpt():
    ids = np.arange(1_115_394)
    train, valid = split(ids, 0.1)
    assert len(train) == int(1_115_394 * 0.9) == 1_003_854
    np.testing.assert_array_equal(np.concatenate([train, valid]), ids)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("name", MAKERS)
def test_types_and_shapes(name, dtype):
    for batch in itertools.islice(MAKERS[name](np.arange(23, dtype=dtype), seq_len=5, batch_size=3), 2):
        assert [x.dtype for x in batch[:3]] == [np.int32, np.int32, np.float32]
        assert [x.shape for x in batch[:3]] == [(3, 5)] * 3
        assert batch.positions is None
        assert batch.segments is None


def test_training_crops_come_once_an_epoch_in_an_order_of_seed_and_epoch():
    ids = np.arange(26) * 7  # 21 starts, 7 batches an epoch
    batches = take(14, ids, seq_len=5, batch_size=3)
    starts = np.concatenate([batch.tokens[:, 0] for batch in batches]) // 7
    for batch in batches:
        np.testing.assert_array_equal(batch.tokens, batch.tokens[:, :1] + 7 * np.arange(5))
        np.testing.assert_array_equal(batch.targets, batch.tokens + 7)
        assert (batch.weights == 1).all()
    first, second = starts[:21], starts[21:]
    assert sorted(first) == sorted(second) == list(range(21))
    assert list(first) != list(second)
    assert list(first) != list(range(21))
    other = take(7, ids, seed=5, seq_len=5, batch_size=3)
    assert list(first) != [start // 7 for batch in other for start in batch.tokens[:, 0]]


def test_one_start_is_enough():
    for batch in take(3, np.arange(4), seq_len=3, batch_size=2):
        assert batch.targets.tolist() == [[1, 2, 3]] * 2


@settings(deadline=None)  # a slow machine is no error
@given(n_before=st.integers(0, 9))
def test_training_resumes_at_the_very_batch(n_before):
    dataset = train_batches(np.arange(17), seq_len=4, batch_size=3, seed=11)
    iterator = iter(dataset)
    for _ in range(n_before):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator) for _ in range(4)]
    resumed = iter(dataset)
    next(resumed)
    resumed.set_state(state)
    for batch in rest:
        assert_equal(batch, next(resumed))


@settings(deadline=None)  # a slow machine is no error
@given(n=st.integers(2, 60), seq_len=st.integers(1, 7), batch_size=st.integers(1, 5))
def test_validation_counts_every_target_once_with_its_own_token(n, seq_len, batch_size):
    ids = np.arange(n, dtype=np.int32) + 1
    batches = valid_batches(ids, seq_len=min(seq_len, n - 1), batch_size=batch_size)
    tokens, targets, weights = (np.concatenate([batch[i].ravel() for batch in batches]) for i in range(3))
    np.testing.assert_array_equal(targets[weights == 1], ids[1:])
    np.testing.assert_array_equal(tokens[weights == 1], ids[:-1])
    assert weights.sum() == n - 1
    assert not tokens[weights == 0].any()
    assert not targets[weights == 0].any()
    assert all(batch.weights[0].any() for batch in batches)  # no batch is all padding


@pytest.mark.parametrize("name", MAKERS)
def test_refused_sizes(name):
    ids = np.arange(9)
    rule = f"^the {name} split has 9 tokens, but seq_len=9 needs 10"
    with pytest.raises(InputError, match=rf"{rule}; use a shorter --data.seq-len, more text, .*-fraction$"):
        MAKERS[name](ids, seq_len=9, batch_size=1)
    with pytest.raises(InputError, match=r"^seq_len=0 must be at least 1 token$"):
        MAKERS[name](ids, seq_len=0, batch_size=1)
    with pytest.raises(InputError, match=r"^batch_size=0 must be at least 1 sequence$"):
        MAKERS[name](ids, seq_len=1, batch_size=0)


def test_refused_numbers():
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=rf"^seed={seed} must be from 0 to 2³² − 1$"):
            train_batches(np.arange(9), seq_len=1, batch_size=1, seed=seed)
    for fraction in (0.0, 1.0):
        with pytest.raises(InputError, match=rf"^valid_fraction={fraction} must be between 0 and 1; 0.1 holds out"):
            split(np.arange(9), fraction)
