"""Text from a model: a prefill over the prompt, then one loop whose carry holds the cache.

`prefill` and `decode` are the two halves, `generate` is both, `stream` gives each token as it comes. All are pure and
may be called inside your own `jit` and `vmap`. Prompts of different length go in one batch, padded on the right.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tx_jax.cache import Cache, from_reading_order, init_cache, to_reading_order
from tx_jax.decoding.samplers import Sampler, check_sampler, sample
from tx_jax.errors import require
from tx_jax.models import DecoderLM, EncoderDecoder

LanguageModel = DecoderLM | EncoderDecoder
BUCKET = 64  # prompts are padded to a multiple of this many tokens, so that few lengths are compiled


class Prompt(NamedTuple):
    """Ragged prompts as one batch, padded on the right."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]  # 0, 1, 2, …; −1 on padding


class Generation(NamedTuple):
    """What `generate` gives."""

    tokens: Int[Array, "B new"]  # after a row's end: the first eos_id
    lengths: Int[Array, " B"]  # tokens of each row, the eos_id that ends it included
    cache: Cache  # of the prompt and all tokens but the last


def pad_prompts(prompts: Sequence[Sequence[int]], width: int | None = None) -> Prompt:
    """Prompts of any lengths as one batch, `width` tokens wide (None: as the longest).

    >>> pad_prompts([[5, 6], [7]]).positions.tolist()
    [[0, 1], [0, -1]]

    Raises:
        InputError: there is no prompt, or one has no token.
    """
    lengths = [len(prompt) for prompt in prompts]
    require(lengths, "prompts=[]: give at least one prompt")
    require(min(lengths), f"prompt {lengths.index(min(lengths))} has no token; a model goes on from at least one")
    width = max(lengths) if width is None else max(width, *lengths)
    rows = [list(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
    index = np.arange(width)
    positions = np.where(index < np.array(lengths)[:, None], index, -1)
    return Prompt(jnp.asarray(rows, jnp.int32), jnp.asarray(positions, jnp.int32))


def check_tokens(tokens: Array | np.ndarray, vocab_size: int, name: str = "tokens") -> None:
    """Hold ids to (B, T) integers in [0, vocab_size), where their values can be seen.

    Raises:
        InputError: another shape or dtype, no tokens, or an id outside of the vocabulary.
    """
    require(tokens.ndim == 2, f"{name}.shape={tokens.shape} must be (batch, length); wrap one row as [row]")
    require(jnp.issubdtype(tokens.dtype, jnp.integer), f"{name}.dtype={tokens.dtype} must be an integer")
    require(tokens.size, f"{name}.shape={tokens.shape} holds no token; give at least one a row")
    if not isinstance(tokens, Tracer):
        values = np.asarray(tokens)  # not tokens.min(), which inside a jit that closes over them is traced
        low, high = int(values.min()), int(values.max())
        bad = low if low < 0 else high
        require(low >= 0 and high < vocab_size, f"{name} holds id {bad}; the vocabulary is 0 … {vocab_size - 1}")


def prefill(
    model: LanguageModel,
    params: dict,
    prompt: Prompt,
    cache: Cache,
    memory: Cache | None = None,
    prefix_lm: bool = False,
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits after each row's last real token, and the cache filled with the prompt. One pass.

    With prefix_lm the prompt's tokens all see each other, as a model learns it by the objective of that name.
    """
    last = prompt.positions.argmax(axis=1)
    more = {"prefix": last + 1} if prefix_lm else {}
    x, cache = hidden_of(model, params, prompt.tokens, prompt.positions, cache, memory, **more)
    return logits_of(model, params, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]), cache


def decode(
    model: LanguageModel,
    params: dict,
    logits: Float[Array, "B V"],
    cache: Cache,
    max_new_tokens: int,
    sampler: Sampler = Sampler(),
    key: PRNGKeyArray | None = None,
    eos_id: int | tuple[int, ...] | Int[Array, "*n"] | None = None,
    memory: Cache | None = None,
) -> Generation:
    """`max_new_tokens` tokens from what `prefill` gave; with an eos_id, or several, the loop ends when all have."""
    B = logits.shape[0]
    ends = None if eos_id is None else jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))

    def choose(i: Array, logits: Array, done: Array) -> tuple[Array, Array]:
        token = sample(logits, sampler, None if key is None else jax.random.fold_in(key, i))
        if ends is None:
            return token, done
        token = jnp.where(done, ends[0], token)
        return token, done | (token[:, None] == ends).any(axis=1)

    laid = to_reading_order(memory)

    def step(carry: tuple) -> tuple:
        i, token, cache, done, tokens, lengths = carry
        positions = jnp.where(done, -1, cache.next_positions())  # a row that has ended writes nothing more
        x, cache = hidden_of(model, params, token[:, None], positions[:, None], cache, from_reading_order(laid))
        lengths += ~done
        token, done = choose(i, logits_of(model, params, x[:, 0]), done)
        return i + 1, token, cache, done, tokens.at[:, i].set(token), lengths

    token, done = choose(jnp.int32(0), logits, jnp.zeros(B, bool))
    fill = jnp.int32(0) if ends is None else ends[0]
    tokens = jnp.full((B, max_new_tokens), fill).at[:, 0].set(token)
    first = (jnp.int32(1), token, cache, done, tokens, jnp.ones(B, jnp.int32))
    last = jax.lax.while_loop(lambda carry: (carry[0] < max_new_tokens) & ~carry[3].all(), step, first)
    return Generation(tokens=last[4], lengths=last[5], cache=last[2])


def generate(
    model: LanguageModel,
    params: dict,
    tokens: Int[Array, "B T"] | np.ndarray,
    positions: Int[Array, "B T"] | np.ndarray | None = None,
    *,
    max_new_tokens: int,
    sampler: Sampler = Sampler(),
    key: PRNGKeyArray | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    memory: Cache | None = None,
    prefix_lm: bool = False,
) -> Generation:
    """Up to `max_new_tokens` tokens after each prompt.

    Args:
        tokens, positions: prompts, padded on the right; `pad_prompts` makes both. Positions None: no padding.
        sampler: greedy by default; otherwise `key` is needed.
        eos_id: the token that ends a row, or several that do.
        memory: an EncoderDecoder's `encode(source)`.
        prefix_lm: the prompt's tokens see each other, for a DecoderLM that was trained so.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> generate(model, init_params(model, jax.random.key(0)), jnp.ones((1, 3), int), max_new_tokens=4).tokens.shape
    (1, 4)

    Raises:
        InputError: ids outside of the vocabulary, a prompt and max_new_tokens beyond model.cfg.max_len, positions
            that are not 0, 1, 2, … then −1, a sampler's number or eos_id out of bounds, or no key where one is needed.
    """
    prompt, n_slots = prepare(model, tokens, positions, max_new_tokens, sampler, key, memory, prefix_lm)
    V = cast(int, model.cfg.vocab_size)
    for end in eos_id if isinstance(eos_id, tuple) else (eos_id,):
        require(not isinstance(end, int) or 0 <= end < V, f"eos_id={end} must be from 0 to {V - 1}")
    ends = (jnp.asarray(eos_id, jnp.int32) if eos_id else None) if isinstance(eos_id, tuple) else eos_id
    return _generate(model, params, prompt, max_new_tokens, n_slots, sampler, key, ends, memory, prefix_lm)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 9))
def _generate(model, params, prompt, max_new_tokens, n_slots, sampler, key, eos_id, memory, prefix_lm):
    cache = init_cache(model.cfg, prompt.tokens.shape[0], n_slots)
    logits, cache = prefill(model, params, prompt, cache, memory, prefix_lm)
    return decode(model, params, logits, cache, max_new_tokens, sampler, key, eos_id, memory)


def stream(
    model: LanguageModel,
    params: dict,
    tokens: Int[Array, "B T"] | np.ndarray,
    positions: Int[Array, "B T"] | np.ndarray | None = None,
    *,
    max_new_tokens: int,
    sampler: Sampler = Sampler(),
    key: PRNGKeyArray | None = None,
    memory: Cache | None = None,
    prefix_lm: bool = False,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, (B,) at a time, each as soon as it is there. Arguments and errors are its own."""
    prompt, n_slots = prepare(model, tokens, positions, max_new_tokens, sampler, key, memory, prefix_lm)
    cache = init_cache(model.cfg, prompt.tokens.shape[0], n_slots)
    logits, cache = fill(model, params, prompt, cache, memory, prefix_lm)
    return (token for token, _ in steps(model, params, logits, cache, max_new_tokens, sampler, key, memory))


fill = functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)(prefill)


def steps(
    model: LanguageModel,
    params: dict,
    logits: Float[Array, "B V"],
    cache: Cache,
    max_new_tokens: int,
    sampler: Sampler,
    key: PRNGKeyArray | None,
    memory: Cache | None = None,
    with_room: Callable[[Cache], Cache] = lambda cache: cache,
) -> Iterator[tuple[np.ndarray, Cache]]:
    """`decode` in Python: each token as soon as it is there, and the cache before it, which the next step takes away.

    Args:
        with_room: what gives a cache the slot that the next token needs.
    """
    laid = _lay(memory)
    for i in range(max_new_tokens):
        token = _choose(logits, sampler, key, i)
        yield np.asarray(token), cache
        if i + 1 < max_new_tokens:  # else the cache that was given last would be gone
            logits, cache = _advance(model, params, token, with_room(cache), laid)


_lay = jax.jit(to_reading_order)


@jax.jit
def _choose(logits, sampler, key, i):
    return sample(logits, sampler, None if key is None else jax.random.fold_in(key, i))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(model, params, token, cache, laid):
    x, cache = hidden_of(model, params, token[:, None], None, cache, from_reading_order(laid))
    return logits_of(model, params, x[:, 0]), cache


def hidden_of(model, params, tokens, positions, cache, memory, **more) -> Any:
    """The hidden vectors of new tokens, and the cache with them; memory None for a decoder-only model."""
    source = more if memory is None else more | {"memory": memory}
    return model.apply({"params": params}, tokens, positions, cache=cache, **source, method="hidden")


def logits_of(model, params, x) -> Any:
    """The logits of hidden vectors."""
    return model.apply({"params": params}, x, method="logits")


def prepare(model, tokens, positions, max_new_tokens, sampler, key, memory, prefix_lm=False) -> tuple[Prompt, int]:
    """The checked prompt, padded to its bucket, and how many cache slots it needs with what follows."""
    cfg = model.cfg
    plain = memory is None and cfg.window is None
    require(plain or not prefix_lm, "prefix_lm=True is for a decoder-only model that sees all, without a window")
    tokens = jnp.asarray(tokens) if isinstance(tokens, list) else tokens
    check_tokens(tokens, cfg.vocab_size)
    B, T = tokens.shape
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    room = cfg.max_len - T
    short = f"shorten it to at most {max(cfg.max_len - max_new_tokens, 1)}"
    remedy = f"ask for at most {room}, or shorten it" if room > 0 else short
    rule = f"a prompt of {T} tokens and max_new_tokens={max_new_tokens} exceed max_len={cfg.max_len}"
    require(max_new_tokens <= room, f"{rule}; {remedy}")
    check_sampler(sampler)
    greedy = sampler.temperature is None
    rules = [name for name in ("top_k", "top_p", "min_p") if getattr(sampler, name) is not None]
    require(
        not (greedy and rules),
        f"{', '.join(rules)} without a temperature above 0 would be ignored; set one, such as 1.0",
    )
    require(greedy or key is not None, "sampling needs key=jax.random.key(seed); without a temperature it is greedy")
    needs_memory = isinstance(model, EncoderDecoder)
    require(needs_memory == (memory is not None), _MEMORY_RULE[needs_memory])
    rows = B if memory is None else memory.positions.shape[0]
    require(rows == B, f"memory holds {rows} sources, tokens {B} rows; encode one source for each row")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    _check_positions(positions, (B, T))
    width = 1 if T == 1 else min(-(-T // BUCKET) * BUCKET, cfg.max_len)  # one token: as translations begin
    pad = ((0, 0), (0, width - T))
    prompt = Prompt(jnp.pad(tokens, pad).astype(jnp.int32), jnp.pad(positions, pad, constant_values=-1))
    n_slots = width + max_new_tokens
    return prompt, n_slots if cfg.reach is None else min(n_slots, cfg.reach + width - 1)


_MEMORY_RULE = {
    True: "memory=None: an encoder-decoder needs memory=model.apply({'params': params}, source, method='encode')",
    False: "memory is for an encoder-decoder; a decoder-only model takes none",
}


def _check_positions(positions: Array | np.ndarray, shape: tuple[int, int]) -> None:
    require(positions.shape == shape, f"positions.shape={positions.shape} must be that of tokens, {shape}")
    if not isinstance(positions, Tracer):
        rows = np.asarray(positions)
        lengths = (rows >= 0).sum(axis=1, keepdims=True)
        index = np.arange(shape[1])
        right = (rows == np.where(index < lengths, index, -1)).all() and lengths.min() > 0
        require(right, "positions must be 0, 1, 2, … and then −1 in each row, with a token in each; see pad_prompts")
