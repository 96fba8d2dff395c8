"""Beam search: the likeliest texts of a model, several candidates of each sentence at a time.

One loop, as `decode`'s, over B × n_beams rows. A prompt is read once a sentence, and so is an encoder's memory at each
step; only the cache of self-attention follows the beams, by one `jax.tree.map`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tx_jax.cache import Cache, by_slots, init_cache
from tx_jax.decoding.beam_rules import LENGTH_PENALTIES, RULES, Rules, among, check_ids, check_numbers
from tx_jax.decoding.generate import hidden_of, logits_of, prefill
from tx_jax.decoding.prompts import LanguageModel, prepare
from tx_jax.decoding.rules import Number
from tx_jax.decoding.samplers import Sampler


class Beams(NamedTuple):
    """What `beam_search` gives, the best first. Where fewer texts exist: length 0 and scores of −inf.

    >>> found = Beams(jnp.array([[[5, 2, 2]]]), jnp.array([[2]]), jnp.array([[-0.5]]), jnp.array([[-0.6]]))
    >>> found.tokens[0, 0, : found.lengths[0, 0]].tolist()  # the best text after the first prompt
    [5, 2]
    """

    tokens: Int[Array, "B n_best new"]  # after the end: the first eos_id
    lengths: Int[Array, "B n_best"]  # tokens, the eos_id that ends them included
    scores: Float[Array, "B n_best"]  # log_probs divided by the length penalty
    log_probs: Float[Array, "B n_best"]  # the sum over the tokens, in nats


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
    eos_id: int | Sequence[int],
    memory: Cache | None = None,
    n_beams: int = 4,
    n_best: int = 1,
    length_penalty: Number = 0.6,
    penalty: str = "gnmt",
    early_stopping: bool = False,
    min_new_tokens: int = 0,
    no_repeat_ngram: int = 0,
    forced: Sequence[int] = (),
    forbidden: Sequence[int] = (),
) -> Beams:
    """The n_best best texts of up to `max_new_tokens` tokens after each prompt, among those that the beams meet.

    At each step the n_beams best candidates that do not end live on, and those that end are finished if they are
    among the n_beams best of all; at max_new_tokens all end. One beam is greedy `generate`.

    Args:
        tokens, positions, eos_id, memory: as of `generate`; memory holds one row a prompt.
        length_penalty: α of the penalty; 0 ranks by log-probability alone. 0.6 with 4 beams: Vaswani et al. 2017, §6.1.
        penalty: a key of LENGTH_PENALTIES.
        early_stopping: a sentence stops with n_beams finished texts, which where the model is sure are soon found among
            the unlikely; False: when no other can be among the n_best. One beam stops with its first text in any case.
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
    Source: length penalty: Wu et al. 2016, eq. 14.
    """
    prompt, n_slots = prepare(model, tokens, positions, max_new_tokens, Sampler(), None, memory)
    ends = tuple(eos_id) if isinstance(eos_id, Sequence) else (eos_id,)
    rules = Rules(
        n_beams, max_new_tokens, ends, n_best, penalty, early_stopping, min_new_tokens, no_repeat_ngram,
        tuple(forced), tuple(forbidden),
    )  # fmt: skip
    check_numbers(rules, length_penalty)
    check_ids(rules, cast(int, model.cfg.vocab_size))
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

    n_slots = min(n_slots, prompt.tokens.shape[1] + new - 1)  # the last token is never written
    cache = init_cache(model.cfg, prompt.tokens.shape[0], -(-n_slots // CHUNK) * CHUNK)
    logits, cache = prefill(model, params, prompt, cache, memory)
    logits, cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), (logits, cache))
    first = _grow(_start(cache, prompt.tokens.shape[0], rules), logits, rules, penalise)
    last = jax.lax.while_loop(lambda state: (state.step < new) & ~state.done.all(), step, first)
    return jax.tree.map(lambda leaf: leaf[:, : rules.n_best], last.finished)


def _start(cache: Cache, B: int, rules: Rules) -> State:
    """No token yet. All beams are alike, so that only the first is live."""
    n = rules.n_beams
    tokens, none = jnp.full((B, n, rules.max_new_tokens), rules.ends[0], jnp.int32), jnp.full((B, n), -jnp.inf)
    finished = Beams(tokens, jnp.zeros((B, n), jnp.int32), none, none)
    return State(jnp.int32(0), cache, tokens, none.at[:, 0].set(0.0), finished, jnp.zeros(B, bool))


def _grow(state: State, logits: Float[Array, "R V"], rules: Rules, penalise) -> State:
    """Every hypothesis by one token: the best that end are finished, the best others live on with their caches.

    At max_new_tokens all end.
    """
    n, n_tokens = rules.n_beams, state.step + 1
    log_probs, parents, new = _candidates(state, logits, rules)
    tokens = _pick(state.tokens, parents).at[:, :, state.step].set(new)
    ends = among(new, rules.ends) | (n_tokens == rules.max_new_tokens)

    scores = jnp.where(ends & ~state.done[:, None], penalise(log_probs, n_tokens), -jnp.inf)
    ended = Beams(tokens, jnp.full_like(parents, n_tokens), scores, log_probs)
    finished = _best(state.finished, jax.tree.map(lambda leaf: leaf[:, :n], ended), n)

    log_probs, index = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_probs), n)
    tokens, parents = _pick((tokens, parents), index)
    rows = (jnp.arange(len(parents))[:, None] * n + parents).reshape(-1)
    cache = _reorder(state.cache, rows)

    # A log-probability only falls, so that none can come to more than the present one under the larger penalty.
    most = jnp.maximum(penalise(log_probs[:, 0], n_tokens), penalise(log_probs[:, 0], rules.max_new_tokens))
    done = state.done | (finished.scores[:, rules.n_best - 1] >= most)
    done |= (rules.early_stopping | (n == 1)) & (finished.scores[:, -1] > -jnp.inf)
    return State(n_tokens, cache, tokens, log_probs, finished, done)


CHUNK = 16  # slots moved at a time: on CPU 8 and 16 were the fastest of 8 … 128 (benchmarks/beam.py)


def _reorder(cache: Cache, rows: Int[Array, " R"]) -> Cache:
    """The cache with each row's past taken from rows[row]: of its slots, those that hold something, in place."""
    n_chunks = -(-jnp.minimum(cache.next_positions().max(), cache.positions.shape[1]) // CHUNK)

    def move(i: Array, leaf: Array, axis: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(leaf, i * CHUNK, CHUNK, axis)[rows]
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, i * CHUNK, axis)

    return jax.lax.fori_loop(0, n_chunks, lambda i, cache: by_slots(functools.partial(move, i), cache), cache)


def _candidates(state: State, logits: Float[Array, "R V"], rules: Rules) -> tuple[Array, Array, Array]:
    """Of the best one-token continuations, best first: log-probability, parent and token, each (B, n).

    Of one beam its n_beams + len(ends) best suffice; ranked by logits, so that one beam is the argmax exactly.
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
