"""Text from a model: a prefill over the prompt, then one loop whose carry holds the cache.

`prefill` and `decode` are the two halves, `generate` is both. All are pure and may be called inside your own `jit` and
`vmap`. Prompts of different length go in one batch, padded on the right.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tx_jax.cache import Cache, init_cache, resize_cache
from tx_jax.decoding.automaton import Automaton
from tx_jax.decoding.prompts import CHUNK, LanguageModel, Prompt, ends_of, prepare
from tx_jax.decoding.rules import Text, begin_text
from tx_jax.decoding.samplers import Keys, Sampler, Samplers, as_arrays, fold_key, sample
from tx_jax.errors import require


class Generation(NamedTuple):
    """What `generate` gives: R = B · n_samples rows, those of one prompt in turn.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> found = generate(model, init_params(model, jax.random.key(0)), jnp.ones((1, 3), int), max_new_tokens=4)
    >>> found.lengths.tolist(), found.cache.next_positions().tolist()
    ([4], [6])
    """

    tokens: Int[Array, "R new"]  # after a row's end: the first eos_id
    lengths: Int[Array, " R"]  # tokens of each row, the eos_id that ends it included
    log_probs: Float[Array, "R new"]  # of each token by the model, before any rule, in nats; after the end: 0
    top_ids: Int[Array, "R new n_top"]  # the likeliest tokens of each place
    top_log_probs: Float[Array, "R new n_top"]
    cache: Cache  # of the prompt and all tokens but the last


class Writing(NamedTuple):
    """Texts that are being written: the carry of a loop. Batch is axis 0 of every leaf but text.ends."""

    token: Int[Array, " R"]  # the last one, whose keys are not in the cache yet
    cache: Cache
    text: Text
    limit: Int[Array, " R"]  # of new tokens
    done: Bool[Array, " R"]
    state: Int[Array, " R"]  # of the automaton
    log_probs: Float[Array, "R new"]
    top_ids: Int[Array, "R new n_top"]
    top_log_probs: Float[Array, "R new n_top"]


def prefill(
    model: LanguageModel,
    params: dict,
    prompt: Prompt,
    cache: Cache,
    memory: Cache | None = None,
    prefix_lm: bool = False,
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits after each row's last real token, and the cache filled with the prompt. One pass, in chunks.

    With prefix_lm the prompt's tokens all see each other, as a model learns it by the objective of that name.

    >>> from tx_jax import ModelConfig, build, init_params, pad_prompts
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params, prompt = init_params(model, jax.random.key(0)), pad_prompts([[5, 6], [4]])
    >>> logits, cache = jax.jit(prefill, static_argnums=0)(model, params, prompt, init_cache(model.cfg, 2, n_slots=16))
    >>> logits.shape, cache.next_positions().tolist()
    ((2, 7), [2, 1])

    Raises:
        InputError: without a window, the cache has fewer slots than the prompt tokens; memory has not a row for each.
    """
    last, (B, T) = prompt.positions.argmax(axis=1), prompt.tokens.shape
    n_slots = cache.positions.shape[1]
    rule = f"a prompt of {T} tokens exceeds the {n_slots} slots of the cache"
    require(n_slots >= T or model.cfg.reach is not None, f"{rule}; make it by n_slots={T} or more")
    more = {"prefix": last + 1} if prefix_lm else {}
    if prefix_lm or T <= CHUNK:
        x, cache = hidden_of(model, params, prompt.tokens, prompt.positions, cache, memory, **more)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return logits_of(model, params, x), cache

    def read(carry: tuple, chunk: tuple) -> tuple[tuple, None]:
        x_last, cache = carry
        first, tokens, positions = chunk
        x, cache = hidden_of(model, params, tokens, positions, cache, memory)
        x = jnp.take_along_axis(x, jnp.clip(last - first, 0, CHUNK - 1)[:, None, None], axis=1)[:, 0]
        return (jnp.where((last >= first)[:, None], x, x_last), cache), None

    full = (jnp.pad(part, ((0, 0), (0, -T % CHUNK)), constant_values=-i) for i, part in enumerate(prompt))
    chunks = (part.reshape(B, -1, CHUNK).swapaxes(0, 1) for part in full)
    x = jnp.zeros((B, model.cfg.d_model), model.cfg.dtype)
    (x, cache), _ = jax.lax.scan(read, (x, cache), (jnp.arange(0, T, CHUNK), *chunks))
    return logits_of(model, params, x), cache


def decode(
    model: LanguageModel,
    params: dict,
    logits: Float[Array, "R V"],
    cache: Cache,
    max_new_tokens: int,
    sampler: Samplers = Sampler(),
    key: Keys | None = None,
    eos_id: int | tuple[int, ...] | Int[Array, "*n"] | None = None,
    memory: Cache | None = None,
    prompt: Prompt | None = None,
    automaton: Automaton | None = None,
    n_top: int = 0,
) -> Generation:
    """`max_new_tokens` tokens from what `prefill` gave; the loop ends when all rows have.

    What is not named here is as of `generate`; memory may serve several rows each.

    Args:
        prompt: what rules of the sampler are to see of the text before; None: nothing.

    >>> from tx_jax import ModelConfig, build, init_params, pad_prompts
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params, prompt = init_params(model, jax.random.key(0)), pad_prompts([[5, 6], [4]])
    >>> def written(params):
    ...     return decode(model, params, *prefill(model, params, prompt, init_cache(model.cfg, 2, 16)), 4).tokens
    >>> jax.jit(written)(params).shape
    (2, 4)
    """
    ends = None if eos_id is None else jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))
    how = {"sampler": as_arrays(sampler, logits.shape[1]), "key": key, "automaton": automaton}
    first = begin(logits, cache, max_new_tokens, prompt, ends, **how, n_top=n_top)

    def step(writing: Writing) -> Writing:
        return advance(model, params, writing, memory, **how)

    return as_generation(jax.lax.while_loop(lambda writing: ~writing.done.all(), step, first))


def begin(logits, cache, new, prompt=None, ends=None, limit=None, *, sampler, key, automaton=None, n_top=0) -> Writing:
    """Texts with their first token, of which each is to have `limit` (None: new) at most."""
    R = len(logits)
    if prompt is None:
        prompt = Prompt(jnp.zeros((R, 0), jnp.int32), jnp.zeros((R, 0), jnp.int32))
    text = begin_text(prompt.tokens, prompt.positions, new, ends)
    state = jnp.zeros(R, jnp.int32) if automaton is None else jnp.broadcast_to(automaton.start, (R,))
    limit = jnp.full(R, new) if limit is None else limit
    log_probs, top = jnp.zeros((R, new)), (R, new, n_top)
    nothing = Writing(
        jnp.zeros(R, jnp.int32), cache, text, limit, jnp.zeros(R, bool), state, log_probs,
        jnp.zeros(top, jnp.int32), jnp.zeros(top),
    )  # fmt: skip
    return _choose(nothing, logits, sampler, key, automaton)


def advance(model, params, writing: Writing, memory=None, *, sampler, key, automaton=None) -> Writing:
    """Each text that is not done by one token more; of the others, the cache stays as it is, too."""
    positions = jnp.where(writing.done, -1, writing.cache.next_positions())
    x, cache = hidden_of(model, params, writing.token[:, None], positions[:, None], writing.cache, memory)
    return _choose(writing._replace(cache=cache), logits_of(model, params, x[:, 0]), sampler, key, automaton)


def _choose(writing: Writing, logits: Float[Array, "R V"], sampler, key, automaton) -> Writing:
    text, done, state = writing.text, writing.done, writing.state
    n, R, new = text.n_tokens - text.n_prompt, *writing.log_probs.shape
    may = logits if automaton is None else automaton.keep(logits, state)
    token = sample(may, sampler, fold_key(key, n), text)
    here = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(here, token[:, None], axis=1)[:, 0]
    top_log_probs, top_ids = jax.lax.top_k(here, writing.top_ids.shape[2])
    place = jnp.arange(R), jnp.where(done, new, n)  # out of range, where nothing is written
    ended = (token[:, None] == text.ends).any(axis=1) | (n + 1 >= writing.limit)
    if automaton is not None:
        state = jnp.where(done, state, automaton.step(state, token))
        ended |= automaton.final[state]
    return writing._replace(
        token=token, text=text.write(token, done), done=done | ended, state=state,
        log_probs=writing.log_probs.at[place].set(chosen, mode="drop"),
        top_ids=writing.top_ids.at[place].set(top_ids, mode="drop"),
        top_log_probs=writing.top_log_probs.at[place].set(top_log_probs, mode="drop"),
    )  # fmt: skip


def as_generation(writing: Writing) -> Generation:
    """What was written, prompts apart."""
    tokens, lengths = writing.text.written(writing.log_probs.shape[1])
    return Generation(tokens, lengths, writing.log_probs, writing.top_ids, writing.top_log_probs, writing.cache)


def generate(
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
    n_samples: int = 1,
    prefix: Cache | None = None,
    automaton: Automaton | None = None,
    n_top: int = 0,
) -> Generation:
    """Up to `max_new_tokens` tokens after each prompt.

    Args:
        tokens, positions: prompts, padded on the right; `pad_prompts` makes both. Positions None: no padding.
        sampler: greedy by default; otherwise `key` is needed: one, or one for each row, which then is as if alone.
        eos_id: the token that ends a row, or several that do.
        memory: an EncoderDecoder's `encode(source)`.
        prefix_lm: the prompt's tokens see each other, for a DecoderLM that was trained so.
        n_samples: texts of each prompt, which is read once.
        prefix: a cache, of one row or of one for each prompt, after which they go on: what many prompts begin with,
            read once by `prefill`. Rules of the sampler do not see it.
        automaton: what texts may be, or where they stop: `stop_at`, `match_regex`, `match_json`.
        n_top: for each token, that many of the likeliest in its place.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> generate(model, init_params(model, jax.random.key(0)), jnp.ones((1, 3), int), max_new_tokens=4).tokens.shape
    (1, 4)

    Raises:
        InputError: ids outside of the vocabulary, a prompt and max_new_tokens beyond model.cfg.max_len, positions
            that are not 0, 1, 2, … then −1, a sampler's number or eos_id out of bounds, or no key where one is needed.
    """
    V = cast(int, model.cfg.vocab_size)
    ends = ends_of(eos_id, V)
    prompt, n_slots = prepare(
        model, tokens, positions, max_new_tokens, sampler, key, memory, prefix_lm, n_samples, prefix, bool(ends)
    )
    require(0 <= n_top <= V, f"n_top={n_top} must be from 0 to {V}, the tokens that there are")
    ids = jnp.asarray(ends, jnp.int32) if ends else None
    static = max_new_tokens, n_slots, prefix_lm, n_samples, n_top
    return _generate(model, params, prompt, static, as_arrays(sampler, V), key, ids, memory, prefix, automaton)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(model, params, prompt, static, sampler, key, eos_id, memory, prefix, automaton):
    max_new_tokens, n_slots, prefix_lm, n_samples, n_top = static
    B, before = len(prompt.tokens), prompt
    if prefix is None:
        cache = init_cache(model.cfg, B, n_slots)
    else:
        cache = resize_cache(prefix, n_slots, B, model.cfg.n_sinks)
        after = prompt.positions + cache.next_positions()[:, None]
        before = prompt._replace(positions=jnp.where(prompt.positions < 0, -1, after))
    logits, cache = prefill(model, params, before, cache, memory, prefix_lm)
    logits, cache, prompt = jax.tree.map(lambda leaf: jnp.repeat(leaf, n_samples, axis=0), (logits, cache, prompt))
    return decode(model, params, logits, cache, max_new_tokens, sampler, key, eos_id, memory, prompt, automaton, n_top)


def hidden_of(model, params, tokens, positions, cache, memory, **more) -> Any:
    """The hidden vectors of new tokens, and the cache with them; memory None for a decoder-only model."""
    source = more if memory is None else more | {"memory": memory}
    return model.apply({"params": params}, tokens, positions, cache=cache, **source, method="hidden")


def logits_of(model, params, x) -> Any:
    """The logits of hidden vectors."""
    return model.apply({"params": params}, x, method="logits")
