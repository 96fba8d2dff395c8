"""Several tokens a pass: what a draft proposes, the model reads at once, and keeps as far as it would have written it.

On average a pass of a few tokens costs little more than one of a single token, which is bound by reading the weights. A
draft is a smaller model of the same vocabulary, or the text itself: what followed the last time that it stood so.
Greedy texts stay what they are, and drawn ones keep their distribution.

Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2; prompt look-up: Saxena 2023.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from tx_jax.cache import Cache, init_cache
from tx_jax.decoding.generate import hidden_of, logits_of, prefill
from tx_jax.decoding.prompts import ends_of, prepare
from tx_jax.decoding.rules import Text, begin_text
from tx_jax.decoding.samplers import Keys, Sampler, Samplers, as_arrays, draws, is_by_row, probabilities
from tx_jax.errors import require
from tx_jax.models import DecoderLM


class Speculation(NamedTuple):
    """What `speculate` gives.

    >>> found = Speculation(jnp.array([[5, 2, 2]]), jnp.array([2]), log_probs=jnp.zeros((1, 3)), n_passes=jnp.array(1))
    >>> found.tokens[0, : found.lengths[0]].tolist()
    [5, 2]
    """

    tokens: Int[Array, "B new"]  # after a row's end: the first eos_id
    lengths: Int[Array, " B"]  # tokens of each row, the eos_id that ends it included
    log_probs: Float[Array, "B new"]  # of each token by the model, before any rule, in nats; after the end: 0
    n_passes: Int[Array, ""]  # of the model, after the prompt's; without a draft there would be lengths.max() − 1


class _Loop(NamedTuple):
    """The carry."""

    n: Int[Array, ""]  # passes
    text: Text
    cache: Cache
    draft_cache: Cache | None
    done: Bool[Array, " B"]
    log_probs: Float[Array, "B new"]


def speculate(
    model: DecoderLM,
    params: dict,
    tokens: Int[Array, "B T"] | np.ndarray,
    positions: Int[Array, "B T"] | np.ndarray | None = None,
    *,
    max_new_tokens: int,
    draft: tuple[DecoderLM, dict] | None = None,
    n_draft: int = 10,
    sampler: Samplers = Sampler(),
    key: Keys | None = None,
    eos_id: int | tuple[int, ...] | None = None,
) -> Speculation:
    """`generate`, in fewer passes of the model. What is not named here is as there.

    Args:
        draft: a model of the same vocabulary, and its parameters; None: look-up, for texts that repeat their prompt.
        n_draft: tokens that are proposed at a time.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> speculate(model, init_params(model, jax.random.key(0)), jnp.ones((1, 3), int), max_new_tokens=4).tokens.shape
    (1, 4)

    Raises:
        InputError: what `generate` refuses, a draft of another vocabulary or of fewer positions, or n_draft below 1.
    Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2; prompt look-up: Saxena 2023.
    """
    cfg, V = model.cfg, cast(int, model.cfg.vocab_size)
    ends = ends_of(eos_id, V)
    prompt, n_slots = prepare(model, tokens, positions, max_new_tokens, sampler, key, None, ends=bool(ends))
    require(n_draft >= 1, f"n_draft={n_draft} must be at least 1; without a draft, use generate")
    if draft is not None:
        pair = isinstance(draft, tuple) and len(draft) == 2
        require(pair, f"draft={type(draft).__name__} must be two: a model and its parameters")
        other = draft[0].cfg
        require(other.vocab_size == V, f"the draft has {other.vocab_size} tokens, the model {V}; they must be the same")
        short = f"the draft has max_len={other.max_len}, the model {cfg.max_len}"
        require(other.max_len >= cfg.max_len, f"{short}; it must reach as far")
    static = max_new_tokens, n_slots + n_draft, n_draft, None if draft is None else draft[0]
    drafting = None if draft is None else draft[1]
    ids = jnp.asarray(ends, jnp.int32)
    return _speculate(model, params, prompt, static, as_arrays(sampler, V), key, ids, drafting)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _speculate(model, params, prompt, static, sampler, key, ends, draft_params):
    new, n_slots, n_draft, draft = static
    B = len(prompt.tokens)
    keys = _keys_of_rows(key, B)
    logits, cache = prefill(model, params, prompt, init_cache(model.cfg, B, n_slots))
    draft_cache = None
    if draft is not None:
        _, draft_cache = prefill(draft, draft_params, prompt, init_cache(draft.cfg, B, n_slots))
    text = begin_text(prompt.tokens, prompt.positions, new, ends)
    first = _Loop(jnp.int32(0), text, cache, draft_cache, jnp.zeros(B, bool), jnp.zeros((B, new)))
    none = jnp.full((B, 0), -1), jnp.zeros((B, 0, logits.shape[1]))
    first = _accept(first, logits[:, None], *none, sampler, _fold(keys, 0))

    def step(loop: _Loop) -> _Loop:
        here = _fold(keys, loop.n + 1)
        if draft is None:
            proposed = look_up(loop.text, n_draft)
            shares = jax.nn.one_hot(proposed, logits.shape[1])
        else:
            proposed, shares, cache = _draft(draft, draft_params, loop, n_draft, sampler, _fold(here, 0))
            loop = loop._replace(draft_cache=cache)
        n_tokens = loop.text.n_tokens[:, None]
        proposed = jnp.where(n_tokens + jnp.arange(n_draft) < model.cfg.max_len, proposed, -1)

        def verify(n: int, loop: _Loop) -> _Loop:
            """One pass over the last token and n proposed ones."""
            read, at = _last(loop.text, 1), jnp.where(loop.done[:, None], -1, n_tokens - 1 + jnp.arange(n + 1))
            tokens = jnp.concatenate([read, proposed[:, :n]], axis=1)
            x, cache = hidden_of(model, params, jnp.maximum(tokens, 0), jnp.where(tokens < 0, -1, at), loop.cache, None)
            loop = loop._replace(n=loop.n + 1, cache=cache)
            return _accept(loop, logits_of(model, params, x), proposed[:, :n], shares[:, :n], sampler, _fold(here, 1))

        some = ((proposed[:, 0] >= 0) & ~loop.done).any()
        return jax.lax.cond(some, functools.partial(verify, n_draft), functools.partial(verify, 0), loop)

    last = jax.lax.while_loop(lambda loop: ~loop.done.all(), step, first)
    return Speculation(*last.text.written(new), last.log_probs, last.n)


def _accept(loop: _Loop, logits, proposed, shares, sampler, keys) -> _Loop:
    """The text with the proposed tokens that the model takes, and one more of its own.

    The keys of those that it does not take stay in the cache, unseen: their positions are later than any query's until
    they are written anew.

    Args:
        logits: (B, n + 1, V) by the model, in the place of each of the n proposed tokens, and after them.
        proposed: (B, n), −1 where there is none.
        shares: (B, n, V), the probabilities by which they were drawn.
    """
    B, n = proposed.shape
    new, ends = loop.log_probs.shape[1], loop.text.ends
    proposed = jnp.pad(proposed, ((0, 0), (0, 1)), constant_values=-1)
    shares = jnp.pad(shares, ((0, 0), (0, 1), (0, 0)))

    def one(carry: tuple, place: tuple) -> tuple[tuple, None]:
        text, log_probs, goes_on, done = carry
        i, logits, token, q = place
        p = probabilities(logits, sampler, text)
        rows, there, at = jnp.arange(B), jnp.maximum(token, 0), _fold(keys, i)
        u = jax.vmap(jax.random.uniform)(_fold(at, 0))
        taken = (token >= 0) & (u * q[rows, there] < p[rows, there])
        rest = jnp.where((token >= 0)[:, None], jnp.maximum(p - q, 0), p)
        rest = jnp.where(rest.sum(axis=1, keepdims=True) > 0, rest, p)  # p = q, and rounding
        token = jnp.where(taken, there, _drawn(_fold(at, 1), rest, sampler))
        silent = done | ~goes_on
        here = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), token[:, None], axis=1)[:, 0]
        where = jnp.where(silent, new, text.n_tokens - text.n_prompt)
        log_probs = log_probs.at[rows, where].set(here, mode="drop")
        text = text.write(token, silent)
        ended = (token[:, None] == ends).any(axis=1) | (text.n_tokens - text.n_prompt >= new)
        return (text, log_probs, goes_on & taken, done | (ended & ~silent)), None

    carry = loop.text, loop.log_probs, jnp.ones(B, bool), loop.done
    places = jnp.arange(n + 1), logits.swapaxes(0, 1), proposed.T, shares.swapaxes(0, 1)
    (text, log_probs, _, done), _ = jax.lax.scan(one, carry, places)
    return loop._replace(text=text, log_probs=log_probs, done=done)


def _draft(draft, params, loop: _Loop, n: int, sampler, keys) -> tuple[Array, Array, Any]:
    """n tokens by the draft, the probabilities by which each was drawn, and its cache.

    It reads the last two tokens again, as it may have seen neither: the model wrote one, and accepted one.
    """
    text = loop.text
    at = text.n_tokens[:, None] - 2 + jnp.arange(2)
    read = (_last(text, 2), jnp.where(loop.done[:, None], -1, jnp.maximum(at, -1)))

    def one(text: Text, cache: Cache, tokens: Array, positions: Array, i: Any) -> tuple:
        positions = jnp.where(positions < draft.cfg.max_len, positions, -1)
        x, cache = hidden_of(draft, params, tokens, positions, cache, None)
        q = probabilities(logits_of(draft, params, x[:, -1]), sampler, text)
        token = _drawn(_fold(keys, i), q, sampler)
        return text.write(token, loop.done), cache, token, q

    def more(carry: tuple, i: Array) -> tuple[tuple, tuple]:
        text, cache, token = carry
        at = jnp.where(loop.done, -1, text.n_tokens - 1)
        text, cache, token, q = one(text, cache, token[:, None], at[:, None], i)
        return (text, cache, token), (token, q)

    text, cache, token, q = one(text, cast(Cache, loop.draft_cache), *read, 0)
    (_, cache, _), (tokens, shares) = jax.lax.scan(more, (text, cache, token), jnp.arange(1, n))
    tokens, shares = (jnp.concatenate([a[None], b]).swapaxes(0, 1) for a, b in ((token, tokens), (q, shares)))
    return tokens, shares, cache


def _drawn(keys: Key[Array, " B"], p: Float[Array, "B V"], sampler: Samplers) -> Int[Array, " B"]:
    """A token of each row; greedy texts have one alone, and a draw among all of a vocabulary takes long."""
    return jax.vmap(jax.random.categorical)(keys, jnp.log(p)) if draws(sampler) else p.argmax(axis=1).astype(jnp.int32)


LEAST = 2  # of the text's last tokens that must agree; one does too often by chance
LONGEST = 4  # that are compared


def look_up(text: Text, n: int) -> Int[Array, "B n"]:
    """The n tokens that followed where the text's last tokens stood before; −1: there are none.

    Of several places where at least LEAST agree, one where more of the last LONGEST do, and then the latest.
    """
    tokens, length = text.tokens, text.n_tokens[:, None]
    index = jnp.arange(tokens.shape[1])  # of the token that may follow
    same, run = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
    for j in range(1, LONGEST + 1):
        last = jnp.take_along_axis(tokens, jnp.maximum(length - j, 0), axis=1)
        same &= (jnp.roll(tokens, j, axis=1) == last) & (index >= j) & (length >= j)
        run += same
    found = jnp.where(index < length, run, 0)
    best = (found * tokens.shape[1] + index).argmax(axis=1)[:, None]
    follow = jnp.take_along_axis(tokens, best + jnp.arange(n), axis=1, mode="fill", fill_value=-1)
    there = jnp.take_along_axis(found, best, axis=1) >= LEAST
    return jnp.where(there & (best + jnp.arange(n) < length), follow, -1)


def _last(text: Text, n: int) -> Int[Array, "B n"]:
    """The last n tokens; where there are fewer, the first is an id that is not read."""
    index = jnp.maximum(text.n_tokens[:, None] - n + jnp.arange(n), 0)
    return jnp.maximum(jnp.take_along_axis(text.tokens, index, axis=1), 0)


def _keys_of_rows(key: Keys | None, B: int) -> Key[Array, " B"]:
    key = jax.random.key(0) if key is None else key  # greedy: no draw has two outcomes
    return key if is_by_row(key) else jax.random.split(key, B)


def _fold(keys: Key[Array, " B"], i: int | Int[Array, ""]) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, i)
