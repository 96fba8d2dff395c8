"""What a beam search may write and how it ranks: length penalties, rules about the next token, and their bounds.

Rules are pure functions of the texts so far to the ids that may not come next. Scores stay the model's own: a rule
takes candidates away and leaves the probabilities of the others as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from tx_jax.errors import require

LENGTH_PENALTIES = {  # what the log-probability of n new tokens, the end included, is divided by; α = 0: by 1
    "gnmt": lambda n, alpha: ((5 + n) / 6) ** alpha,  # Wu et al. 2016, eq. 14
    "plain": lambda n, alpha: n**alpha,
}


class Rules(NamedTuple):
    """What is compiled into a search: the arguments of `beam_search` that are not arrays."""

    n_beams: int
    max_new_tokens: int
    ends: tuple[int, ...]
    n_best: int
    penalty: str
    early_stopping: bool
    min_new_tokens: int
    no_repeat_ngram: int
    forced: tuple[int, ...]
    forbidden: tuple[int, ...]


def among(ids: Int[Array, "*b"], some: tuple[int, ...]) -> Bool[Array, "*b"]:
    """Which ids are among some."""
    return (ids[..., None] == jnp.asarray(some, jnp.int32)).any(axis=-1)


def _repeats(step, tokens: Int[Array, "R new"], V: int, rules: Rules) -> Bool[Array, "R V"]:
    """The ids that would end an n-gram which the text already holds."""
    n, (R, new) = rules.no_repeat_ngram, tokens.shape
    starts = jnp.arange(max(new - n + 1, 0))  # of n-grams
    begun = jax.lax.dynamic_slice_in_dim(tokens, step - n + 1, min(n - 1, new), axis=1)
    same = jnp.broadcast_to(starts + n <= step, (R, len(starts)))
    for i in range(n - 1):
        same &= tokens[:, starts + i] == begun[:, i, None]
    return jnp.zeros((R, V), bool).at[jnp.arange(R)[:, None], tokens[:, starts + n - 1]].max(same)


RULES = {  # of each that is set: which ids may not come next, (R or 1, V)
    "min_new_tokens": lambda step, _, V, rules: among(jnp.arange(V), rules.ends) & (step < rules.min_new_tokens),
    "no_repeat_ngram": _repeats,
    "forced": lambda step, _, V, rules: (
        (jnp.arange(V) != jnp.asarray(rules.forced)[jnp.minimum(step, len(rules.forced) - 1)])
        & (step < len(rules.forced))
    ),
    "forbidden": lambda step, _, V, rules: among(jnp.arange(V), rules.forbidden),
}


def check_numbers(rules: Rules, length_penalty) -> None:
    """Hold every number of a search, and the name of its penalty, to their bounds.

    Raises:
        InputError: one is out of its bounds.
    """
    n, new, least, keys = rules.n_beams, rules.max_new_tokens, rules.min_new_tokens, ", ".join(LENGTH_PENALTIES)
    require(n >= 1, f"n_beams={n} must be at least 1, which is greedy")
    require(
        1 <= rules.n_best <= n, f"n_best={rules.n_best} must be from 1 to n_beams={n}; ask for fewer or search wider"
    )
    require(rules.penalty in LENGTH_PENALTIES, f"penalty={rules.penalty!r} is not one of {keys}")
    finite = isinstance(length_penalty, Tracer) or (np.ndim(length_penalty) == 0 and np.isfinite(length_penalty))
    require(finite, f"length_penalty={length_penalty} must be one finite number; 0 is none")
    require(0 <= least < new, f"min_new_tokens={least} must be from 0 to below max_new_tokens={new}; one is the end")
    require(rules.no_repeat_ngram >= 0, f"no_repeat_ngram={rules.no_repeat_ngram} must be at least 0; 0 leaves it out")


def check_ids(rules: Rules, V: int) -> None:
    """Hold the ids of a search to the vocabulary, and to each other.

    Raises:
        InputError: an id is outside of the vocabulary, or two arguments exclude each other.
    """
    ends, forced, forbidden, n = rules.ends, rules.forced, rules.forbidden, rules.no_repeat_ngram
    require(ends, "eos_id=() must hold at least one id; give the one that ends a text")
    for name, ids in (("eos_id", ends), ("forced", forced), ("forbidden", forbidden)):
        bad = next((i for i in ids if not 0 <= i < V), None)
        require(bad is None, f"{name} holds id {bad}; the vocabulary is 0 … {V - 1}")
    for name, ids, other, others, remedy in (
        ("forced", forced, "eos_id", ends, "nothing follows an end; leave it out"),
        ("forbidden", forbidden, "eos_id", ends, "a text must be able to end; leave it out"),
        ("forced", forced, "forbidden", forbidden, "take it out of one"),
    ):
        both = next((i for i in ids if i in others), None)
        require(both is None, f"{name} holds id {both}, which {other} holds too: {remedy}")
    room = rules.max_new_tokens
    require(len(forced) <= room, f"forced holds {len(forced)} ids, max_new_tokens={room}; force fewer or raise it")
    grams = [forced[i : i + n] for i in range(len(forced) - n + 1)] if n else []
    require(len(grams) == len({*grams}), f"forced={forced} repeats {n} tokens, no_repeat_ngram={n}; change one")
