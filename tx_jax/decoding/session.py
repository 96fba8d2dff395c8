"""A text whose keys stay in a cache while it grows: a conversation is read on from where the last turn ended.

`read` computes only what the cache does not hold; where a text differs from what was read before, the cache is cut back
to where they part, which is a change of its positions alone.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from tx_jax.cache import Cache, init_cache, resize_cache
from tx_jax.decoding.automaton import Automaton
from tx_jax.decoding.prompts import BUCKET, Prompt, pad_prompts
from tx_jax.decoding.samplers import Sampler, Samplers, check_sampler, draws
from tx_jax.decoding.stream import fill, steps
from tx_jax.errors import require
from tx_jax.models import DecoderLM
from tx_jax.modules.embed import check_tokens

Ids = Sequence[int] | Integer[np.ndarray, " T"]
LEAST_SLOTS = 256  # of a cache; it doubles when it is full, so that few sizes are compiled


class Session(NamedTuple):
    """One text and its keys. Giving it to `read` or `write` gives it up: its cache is written in place."""

    ids: tuple[int, ...]  # those in the cache
    cache: Cache


def start(model: DecoderLM) -> Session:
    """A session with no text."""
    return Session((), init_cache(model.cfg, 1, min(LEAST_SLOTS, model.cfg.max_len)))


def read(model: DecoderLM, params: dict, session: Session, ids: Ids) -> tuple[Float[Array, "1 V"], Session]:
    """The logits after `ids`, the whole text, and the session that holds it.

    Raises:
        InputError: the text is empty or longer than model.cfg.max_len, or an id is outside of the vocabulary.
    """
    cfg, ids = model.cfg, tuple(int(i) for i in ids)
    check_tokens(jnp.asarray([ids], jnp.int32), cfg.vocab_size or 0)
    require(len(ids) <= cfg.max_len, f"the text has {len(ids)} tokens, max_len={cfg.max_len}; begin a new one")
    shared = next((i for i, (one, other) in enumerate(zip(session.ids, ids, strict=False)) if one != other), None)
    kept = min(len(session.ids), len(ids) - 1) if shared is None else min(shared, len(ids) - 1)  # one gives logits
    tokens, positions = _in_bucket(ids[kept:], cfg.max_len)
    new = Prompt(tokens, jnp.where(positions < 0, -1, kept + positions))
    cache = _with_room(_cut(session.cache, kept), max(len(ids), tokens.shape[1]), cfg.max_len)
    logits, cache = fill(model, params, new, cache)
    return logits, Session(ids, cache)


def write(
    model: DecoderLM,
    params: dict,
    logits: Float[Array, "1 V"],
    session: Session,
    *,
    max_new_tokens: int,
    sampler: Samplers = Sampler(),
    key: PRNGKeyArray | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    automaton: Automaton | None = None,
) -> Iterator[tuple[int, Session]]:
    """New tokens, each as soon as it is there, with the session before it: what `read` gave, going on.

    Raises:
        InputError: a sampler's number out of bounds, or no key where one is needed.
    """
    check_sampler(sampler, model.cfg.vocab_size, 1, ends=eos_id not in (None, ()))
    require(not draws(sampler) or key is not None, "sampling needs key=jax.random.key(seed)")
    how = {"sampler": sampler, "key": key, "eos_id": eos_id, "automaton": automaton}
    return _write(model, params, logits, session, max_new_tokens, how)


def _write(model, params, logits, session, max_new_tokens, how) -> Iterator[tuple[int, Session]]:
    ids, max_len = session.ids, model.cfg.max_len
    n = min(max_new_tokens, max_len - len(ids))

    def with_room(cache: Cache) -> Cache:
        return _with_room(cache, len(ids), max_len)

    text = _in_bucket(ids, max_len)
    for token, cache in steps(model, params, logits, session.cache, text, n, with_room=with_room, **how):
        yield int(token[0]), Session(ids, cache)
        ids = (*ids, int(token[0]))


def _in_bucket(ids: Ids, max_len: int) -> Prompt:
    return pad_prompts([[*ids]], min(-(-len(ids) // BUCKET) * BUCKET, max_len))


def _cut(cache: Cache, length: int) -> Cache:
    return cache._replace(positions=jnp.where(cache.positions < length, cache.positions, -1))


def _with_room(cache: Cache, length: int, max_len: int) -> Cache:
    """The cache with at least `length` slots. Position p stays in slot p, as no text is longer than its slots."""
    n_slots = now = cache.positions.shape[1]
    while n_slots < length:
        n_slots *= 2
    n_slots = min(n_slots, max(max_len, length))
    return resize_cache(cache, n_slots) if n_slots > now else cache
