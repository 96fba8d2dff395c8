"""Beam search: the likeliest texts of a model, several candidates of each sentence at a time.

One loop, as `decode`'s, over B × n_beams rows. The prompt is read once a sentence, and so is an encoder's memory at each
step; only the cache of self-attention follows the beams, by one `jax.tree.map`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from tx_jax.cache import Cache, init_cache
from tx_jax.decoding.generate import LanguageModel, hidden_of, logits_of, prefill, prepare
from tx_jax.decoding.samplers import Number, Sampler
from tx_jax.errors import require

LENGTH_PENALTIES = {  # what the log-probability of n new tokens, the end included, is divided by; α = 0: by 1
    "gnmt": lambda n, alpha: ((5 + n) / 6) ** alpha,  # Wu et al. 2016, eq. 14
    "plain": lambda n, alpha: n**alpha,
}


class Beams(NamedTuple):
    """What `beam_search` gives, the best first. Where fewer texts exist: length 0 and scores of −inf."""

    tokens: Int[Array, "B n_best new"]  # after the end: the first eos_id
    lengths: Int[Array, "B n_best"]  # tokens, the eos_id that ends them included
    scores: Float[Array, "B n_best"]  # log_probs divided by the length penalty
    log_probs: Float[Array, "B n_best"]  # the sum over the tokens, in nats


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


class State(NamedTuple):
    """The loop's carry; n is n_beams. Live hypotheses stand best first."""

    step: Int[Array, ""]  # tokens written
    cache: Cache  # of B · n rows
    tokens: Int[Array, "B n new"]
    log_probs: Float[Array, "B n"]  # −inf: there is no such hypothesis
    finished: Beams
    done: Bool[Array, " B"]


def beam_search(
    model: LanguageModel,
    params: dict,
    tokens: Int[Array, "B T"] | np.ndarray,
    positions: Int[Array, "B T"] | np.ndarray | None = None,
    *,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...],
    memory: Cache | None = None,
    n_beams: int = 4,
    n_best: int = 1,
    length_penalty: Number = 0.6,
    penalty: str = "gnmt",
    early_stopping: bool = True,
    min_new_tokens: int = 0,
    no_repeat_ngram: int = 0,
    forced: Sequence[int] = (),
    forbidden: Sequence[int] = (),
) -> Beams:
    """The n_best best texts of up to `max_new_tokens` tokens after each prompt, among those that the beams meet.

    At each step the n_beams best candidates that do not end live on, and those that end are finished if they are
    among the n_beams best of all. One beam is greedy `generate`.

    Args:
        tokens, positions, eos_id, memory: as of `generate`; memory holds one row a prompt.
        length_penalty: α of the penalty; 0 ranks by log-probability alone. 0.6 with 4 beams: Vaswani et al. 2017, §6.1.
        penalty: a key of LENGTH_PENALTIES.
        early_stopping: a sentence stops with n_beams finished texts; False: when no live one can enter the n_best any more.
        min_new_tokens: no text ends before it has so many tokens besides its end.
        no_repeat_ngram: no text holds the same n tokens in a row twice (the prompt is not counted); 0: it may.
        forced: what every text begins with.
        forbidden: ids that no text holds.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params, prompts = init_params(model, jax.random.key(0)), jnp.ones((1, 3), int)
    >>> beam_search(model, params, prompts, max_new_tokens=4, eos_id=2, n_best=3).tokens.shape
    (1, 3, 4)

    Raises:
        InputError: what `generate` refuses of a prompt, or a number, an id or a penalty's name out of its bounds.
    """
    prompt, n_slots = prepare(model, tokens, positions, max_new_tokens, Sampler(), None, memory)
    ends = eos_id if isinstance(eos_id, tuple) else (eos_id,)
    rules = Rules(
        n_beams, max_new_tokens, ends, n_best, penalty, early_stopping, min_new_tokens, no_repeat_ngram,
        tuple(forced), tuple(forbidden),
    )  # fmt: skip
    _check_numbers(rules, length_penalty)
    _check_ids(rules, cast(int, model.cfg.vocab_size))
    return _search(model, params, prompt, n_slots, rules, jnp.asarray(length_penalty, jnp.float32), memory)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _search(model, params, prompt, n_slots, rules, alpha, memory):
    n, new = rules.n_beams, rules.max_new_tokens

    def penalise(log_probs, n_tokens):
        return log_probs / LENGTH_PENALTIES[rules.penalty](jnp.asarray(n_tokens, jnp.float32), alpha)

    def step(state: State) -> State:
        token = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2).reshape(-1, 1)
        stopped = jnp.repeat(state.done, n)  # a sentence that has stopped writes nothing more
        positions = jnp.where(stopped, -1, state.cache.next_positions())
        x, cache = hidden_of(model, params, token, positions[:, None], state.cache, memory)
        return _grow(state._replace(cache=cache), logits_of(model, params, x[:, 0]), rules, penalise)

    cache = init_cache(model.cfg, prompt.tokens.shape[0], n_slots)
    logits, cache = prefill(model, params, prompt, cache, memory)
    logits, cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), (logits, cache))
    first = _grow(_start(cache, prompt.tokens.shape[0], rules), logits, rules, penalise)
    last = jax.lax.while_loop(lambda state: (state.step < new) & ~state.done.all(), step, first)
    scores = jnp.where(last.done[:, None], -jnp.inf, penalise(last.log_probs, new))
    return _best(last.finished, Beams(last.tokens, jnp.full_like(last.finished.lengths, new), scores, last.log_probs),
                 rules.n_best)  # fmt: skip


def _start(cache: Cache, B: int, rules: Rules) -> State:
    """No token yet. All beams are alike, so that only the first is live."""
    n = rules.n_beams
    tokens, none = jnp.full((B, n, rules.max_new_tokens), rules.ends[0], jnp.int32), jnp.full((B, n), -jnp.inf)
    finished = Beams(tokens, jnp.zeros((B, n), jnp.int32), none, none)
    return State(jnp.int32(0), cache, tokens, none.at[:, 0].set(0.0), finished, jnp.zeros(B, bool))


def _grow(state: State, logits: Float[Array, "R V"], rules: Rules, penalise) -> State:
    """Every hypothesis by one token: the best that end are finished, the best others live on with their caches."""
    n, n_tokens = rules.n_beams, state.step + 1
    log_probs, parents, new = _candidates(state, logits, rules)
    tokens = _pick(state.tokens, parents).at[:, :, state.step].set(new)
    ends = _among(new, rules.ends)

    scores = jnp.where(ends & ~state.done[:, None], penalise(log_probs, n_tokens), -jnp.inf)
    ended = Beams(tokens, jnp.full_like(parents, n_tokens), scores, log_probs)
    finished = _best(state.finished, jax.tree.map(lambda leaf: leaf[:, :n], ended), n)

    log_probs, index = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_probs), n)
    tokens, parents = _pick((tokens, parents), index)
    rows = (jnp.arange(len(parents))[:, None] * n + parents).reshape(-1)
    cache = jax.tree.map(lambda leaf: leaf[rows], state.cache)

    # A log-probability only falls, so that none can come to more than the present one under the larger penalty.
    most = jnp.maximum(penalise(log_probs[:, 0], n_tokens), penalise(log_probs[:, 0], rules.max_new_tokens))
    done = state.done | (finished.scores[:, rules.n_best - 1] >= most)
    done |= rules.early_stopping & (finished.scores[:, -1] > -jnp.inf)
    return State(n_tokens, cache, tokens, log_probs, finished, done)


def _candidates(state: State, logits: Float[Array, "R V"], rules: Rules) -> tuple[Array, Array, Array]:
    """Of the best one-token continuations, best first: log-probability, parent and token, each (B, n).

    Of one beam its n_beams + len(ends) best suffice, ranked by logits, so that one beam is the argmax whatever the rounding.
    """
    B, n, new = state.tokens.shape
    total = jax.nn.logsumexp(logits, axis=-1)
    for name, rule in RULES.items():
        if getattr(rules, name):
            logits = jnp.where(
                rule(state.step, state.tokens.reshape(B * n, new), logits.shape[1], rules), -jnp.inf, logits
            )
    k = min(logits.shape[1], n + len(rules.ends))
    best, tokens = jax.lax.top_k(logits, k)
    log_probs = state.log_probs[:, :, None] + (best - total[:, None]).reshape(B, n, k)
    log_probs, index = jax.lax.top_k(log_probs.reshape(B, n * k), min(n * k, n * (1 + len(rules.ends))))
    return log_probs, index // k, _pick(tokens.reshape(B, n * k), index)


def _best(one: Beams, other: Beams, n: int) -> Beams:
    """The n best of both; of equals, those of `one`."""
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), one, other)
    return _pick(both, jax.lax.top_k(both.scores, n)[1])


def _pick(tree, index: Int[Array, "B n"]):
    return jax.tree.map(lambda leaf: jax.vmap(lambda row, i: row[i])(leaf, index), tree)


def _among(ids: Int[Array, "*b"], some: tuple[int, ...]) -> Bool[Array, "*b"]:
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
    "min_new_tokens": lambda step, _, V, rules: _among(jnp.arange(V), rules.ends) & (step < rules.min_new_tokens),
    "no_repeat_ngram": _repeats,
    "forced": lambda step, _, V, rules: (
        (jnp.arange(V) != jnp.asarray(rules.forced)[jnp.minimum(step, len(rules.forced) - 1)])
        & (step < len(rules.forced))
    ),
    "forbidden": lambda step, _, V, rules: _among(jnp.arange(V), rules.forbidden),
}


def _check_numbers(rules: Rules, length_penalty: Number) -> None:
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


def _check_ids(rules: Rules, V: int) -> None:
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
