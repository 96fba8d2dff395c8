"""Tokens as they come: `decode` as a loop in Python, one compiled step a token."""

import functools
from collections.abc import Callable, Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tx_jax.cache import Cache, init_cache
from tx_jax.decoding.automaton import Automaton
from tx_jax.decoding.generate import hidden_of, logits_of, prefill
from tx_jax.decoding.prompts import BUCKET, LanguageModel, Prompt, ends_of, prepare
from tx_jax.decoding.rules import begin_text
from tx_jax.decoding.samplers import Keys, Sampler, Samplers, as_arrays, fold_key, sample


def stream(
    model: LanguageModel,
    params: dict,
    tokens: Int[Array, "B T"] | np.ndarray,
    positions: Int[Array, "B T"] | np.ndarray | None = None,
    *,
    max_new_tokens: int,
    sampler: Samplers = Sampler(),
    key: Keys | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    memory: Cache | None = None,
    prefix_lm: bool = False,
    automaton: Automaton | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, (B,) at a time, each as soon as it is there. Arguments are its own.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> tokens = stream(model, init_params(model, jax.random.key(0)), jnp.ones((1, 3), int), max_new_tokens=2)
    >>> [token.shape for token in tokens]
    [(1,), (1,)]

    Raises:
        InputError: what `generate` refuses.
    """
    ends = bool(ends_of(eos_id, cast(int, model.cfg.vocab_size)))
    more = {"sampler": sampler, "key": key, "memory": memory}
    prompt, n_slots = prepare(model, tokens, positions, max_new_tokens, prefix_lm=prefix_lm, ends=ends, **more)
    cache = init_cache(model.cfg, prompt.tokens.shape[0], n_slots)
    logits, cache = fill(model, params, prompt, cache, memory, prefix_lm)
    more |= {"eos_id": eos_id, "automaton": automaton}
    return (token for token, _ in steps(model, params, logits, cache, prompt, max_new_tokens, **more))


fill = functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)(prefill)


def steps(
    model: LanguageModel,
    params: dict,
    logits: Float[Array, "B V"],
    cache: Cache,
    prompt: Prompt,
    max_new_tokens: int,
    *,
    sampler: Samplers,
    key: Keys | None,
    eos_id: int | tuple[int, ...] | None = None,
    memory: Cache | None = None,
    automaton: Automaton | None = None,
    with_room: Callable[[Cache], Cache] = lambda cache: cache,
) -> Iterator[tuple[np.ndarray, Cache]]:
    """`decode` in Python: each token as soon as it is there, and the cache before it, which the next step takes away.

    Args:
        prompt: what rules of the sampler see of the text before.
        with_room: what gives a cache the slot that the next token needs.
    """
    sampler = as_arrays(sampler, logits.shape[1])
    ends = jnp.atleast_1d(jnp.asarray(() if eos_id is None else eos_id, jnp.int32))
    text = begin_text(*prompt, -(-max_new_tokens // BUCKET) * BUCKET, ends)
    done = jnp.zeros(len(logits), bool)
    state = None if automaton is None else jnp.broadcast_to(automaton.start, done.shape)
    may_end = ends.size or automaton is not None
    for i in range(max_new_tokens):
        token, text, done, state = _choose(logits, text, done, state, sampler, key, i, automaton)
        yield np.asarray(token), cache
        if i + 1 == max_new_tokens or (may_end and done.all()):  # else the cache that was given last would be gone
            return
        logits, cache = _advance(model, params, token, done, with_room(cache), memory)


@jax.jit
def _choose(logits, text, done, state, sampler, key, i, automaton):
    may = logits if automaton is None else automaton.keep(logits, state)
    token = sample(may, sampler, fold_key(key, i), text)
    token = jnp.where(done, text.ends[0] if text.ends.size else 0, token)
    ended = done | (token[:, None] == text.ends).any(axis=1)
    if automaton is not None:
        state = jnp.where(done, state, automaton.step(state, token))
        ended |= automaton.final[state]
    return token, text.write(token, done), ended, state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _advance(model, params, token, done, cache, memory):
    positions = jnp.where(done, -1, cache.next_positions())
    x, cache = hidden_of(model, params, token[:, None], positions[:, None], cache, memory)
    return logits_of(model, params, x[:, 0]), cache
