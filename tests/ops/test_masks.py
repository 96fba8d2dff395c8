"""Every rule of a mask against its definition, pair by pair; their conjunction; and the part that one block reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_jax import Mask

T, S = 5, 7  # one shape for all: each shape costs a compilation


def rows(n, least, most, batch=2):
    return st.lists(st.lists(st.integers(least, most), min_size=n, max_size=n), min_size=batch, max_size=batch)


MASKS = st.fixed_dictionaries(
    {"causal": st.booleans(), "window": st.none() | st.integers(1, 6)},
    optional={
        "q_positions": rows(T, -1, 8),
        "k_positions": rows(S, -1, 8),
        "segments": st.tuples(rows(T, 0, 2), rows(S, 0, 2)),
        "prefix": st.lists(st.integers(0, 8), min_size=2, max_size=2),
    },
)


def make(rules):
    q_segments, k_segments = rules.get("segments", (None, None))
    arrays = {name: rules.get(name) for name in ("q_positions", "k_positions", "prefix")}
    arrays |= {"q_segments": q_segments, "k_segments": k_segments}
    return Mask(
        causal=rules["causal"], window=rules["window"],
        **{name: None if rows is None else jnp.array(rows) for name, rows in arrays.items()},
    )  # fmt: skip


def may_attend(rules, b, t, s):
    """The definition of one pair."""
    q = rules["q_positions"][b][t] if "q_positions" in rules else t
    k = rules["k_positions"][b][s] if "k_positions" in rules else s
    if k < 0:
        return False  # no key here
    if "segments" in rules and rules["segments"][0][b][t] != rules["segments"][1][b][s]:
        return False
    if "prefix" in rules and q >= 0 and k < rules["prefix"][b]:
        return True
    return (not rules["causal"] or k <= q) and (rules["window"] is None or abs(q - k) < rules["window"])


@settings(deadline=None)  # a slow machine is no error
@given(MASKS)
def test_a_mask_is_the_conjunction_of_its_rules(rules):
    got = make(rules).materialize(T, S)
    expected = [[[may_attend(rules, b, t, s) for s in range(S)] for t in range(T)] for b in range(2)]
    np.testing.assert_array_equal(np.broadcast_to(got, (2, T, S)), expected)


@settings(deadline=None)
@given(MASKS, st.sampled_from([(0, 2, 0, 7), (2, 3, 1, 6), (1, 3, 3, 1)]))
def test_a_part_of_a_mask_is_the_mask_of_a_part(rules, part):
    (start, n, k_start, n_keys), mask = part, make(rules)
    got = mask.rows(start, n, T).columns(k_start, n_keys, S).materialize(n, n_keys)
    np.testing.assert_array_equal(got, mask.materialize(T, S)[:, start : start + n, k_start : k_start + n_keys])


@settings(deadline=None)
@given(MASKS, st.integers(0, 2), st.sampled_from([(0, 2), (2, 5), (3, 4)]))
def test_what_is_seen_is_within_reach(rules, n_sinks, part):
    """And all of the reach of a block is seen by one of its queries, where order says all."""
    mask = dataclasses.replace(make(rules), n_sinks=n_sinks)
    seen = np.flatnonzero(mask.materialize(T, S)[:, slice(*part)].any(axis=(0, 1)))
    first, last = mask.reach(*part, S)
    assert 0 <= first < last <= S
    if len(seen):
        assert first <= seen[0]
        assert seen[-1] < last
    if not n_sinks and all(x is None for x in jax.tree.leaves(mask)):
        assert (first, last) == (seen[0], seen[-1] + 1)


def test_each_rule_by_itself():
    """What the tables above would not say if both sides were wrong alike."""
    pictures = {
        Mask(): "xxxx xxxx xxxx xxxx",
        Mask(causal=True): "x... xx.. xxx. xxxx",
        Mask(causal=True, window=2): "x... xx.. .xx. ..xx",
        Mask(window=2): "xx.. xxx. .xxx ..xx",
    }
    for mask, picture in pictures.items():
        got = " ".join("".join(".x"[int(seen)] for seen in row) for row in mask.materialize(4, 4)[0])
        assert got == picture, mask


def test_no_batch_is_needed_where_rows_do_not_differ():
    assert Mask(causal=True).materialize(3, 5).shape == (1, 3, 5)
    assert Mask(q_positions=jnp.zeros((2, 3), int)).materialize(3, 5).shape == (2, 3, 5)
