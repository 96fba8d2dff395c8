"""Prompts as one batch, and what they need before anything is compiled: checks, a bucket, slots in a cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from tx_jax.cache import Cache
from tx_jax.decoding.samplers import check_sampler, draws, is_by_row
from tx_jax.errors import require
from tx_jax.models import DecoderLM, EncoderDecoder
from tx_jax.modules.embed import check_tokens

LanguageModel = DecoderLM | EncoderDecoder
BUCKET = 64  # prompts are padded to a multiple of this many tokens, so that few lengths are compiled
CHUNK = 512  # tokens of a prompt that are read at a time: the memory of a longer one is that of its cache


class Prompt(NamedTuple):
    """Ragged prompts as one batch, padded on the right.

    >>> pad_prompts([[5, 6], [7]]).tokens.tolist()
    [[5, 6], [7, 0]]
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]  # 0, 1, 2, …; −1 on padding


def pad_prompts(prompts: Sequence[Sequence[int]], width: int | None = None) -> Prompt:
    """Prompts of any lengths as one batch, `width` tokens wide (None: as the longest).

    >>> pad_prompts([[5, 6], [7]]).positions.tolist()
    [[0, 1], [0, -1]]

    Raises:
        InputError: there is no prompt, or one has no token, or what is no integer.
    """
    lengths = [len(prompt) for prompt in prompts]
    require(lengths, "prompts=[]: give at least one prompt")
    require(min(lengths), f"prompt {lengths.index(min(lengths))} has no token; a model goes on from at least one")
    width = max(lengths) if width is None else max(width, *lengths)
    rows = [list(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
    kind = np.asarray(rows).dtype
    require(np.issubdtype(kind, np.integer), f"prompts hold {kind}; ids are integers")
    index = np.arange(width)
    positions = np.where(index < np.array(lengths)[:, None], index, -1)
    return Prompt(jnp.asarray(rows, jnp.int32), jnp.asarray(positions, jnp.int32))


def ends_of(eos_id: int | tuple[int, ...] | None, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text.

    Raises:
        InputError: the vocabulary has none of that number.
    """
    ends = () if eos_id is None else tuple(eos_id) if isinstance(eos_id, Sequence) else (eos_id,)
    for end in ends:
        inside = isinstance(end, Tracer) or 0 <= end < vocab_size
        require(inside, f"eos_id={end} must be from 0 to {vocab_size - 1}")
    return ends


def prepare(
    model,
    tokens: Any,
    positions: Any,
    max_new_tokens,
    sampler,
    key,
    memory,
    prefix_lm=False,
    n_samples=1,
    prefix=None,
    ends: bool = True,
) -> tuple[Prompt, int]:
    """The checked prompt, padded to its bucket, and how many cache slots it needs with what follows.

    What is not named here is as of `generate`.

    Args:
        tokens, positions: (B, T), padded on the right; positions None: no padding.
        ends: whether an id ends a text.

    >>> from tx_jax import ModelConfig, Sampler, build
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> prompt, n_slots = prepare(model, [[5, 6, 4]], None, 10, Sampler(), key=None, memory=None)
    >>> prompt.tokens.shape, n_slots
    ((1, 64), 74)

    Raises:
        InputError: what `generate` refuses, eos_id and n_top apart.
    """
    cfg = model.cfg
    tokens = check_tokens(tokens, cfg.vocab_size)
    B, T = tokens.shape
    n_prefix, held = _check_prefix(prefix, B)
    plain = memory is None and cfg.window is None and prefix is None
    require(plain or not prefix_lm, _PREFIX_RULE)
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    require(n_samples >= 1, f"n_samples={n_samples} must be at least 1 a prompt")
    room = cfg.max_len - held - T
    short = f"shorten it to at most {max(cfg.max_len - held - max_new_tokens, 1)}"
    remedy = f"ask for at most {room}, or shorten it" if room > 0 else short
    after = f" after {held} of the prefix" if held else ""
    rule = f"a prompt of {T} tokens{after} and max_new_tokens={max_new_tokens} exceed max_len={cfg.max_len}"
    require(max_new_tokens <= room, f"{rule}; {remedy}")
    check_sampler(sampler, cast(int, cfg.vocab_size), B * n_samples, ends)
    _check_key(key, draws(sampler), B * n_samples)
    needs_memory = isinstance(model, EncoderDecoder)
    require(needs_memory == (memory is not None), _MEMORY_RULE[needs_memory])
    rows = B if memory is None else memory.positions.shape[0]
    require(rows == B, f"memory holds {rows} sources, tokens {B} rows; encode one source for each row")
    if positions is None:
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    check_positions(positions, (B, T))
    bucket = BUCKET if T <= CHUNK else CHUNK
    width = 1 if T == 1 else min(-(-T // bucket) * bucket, cfg.max_len)  # one token: as translations begin
    pad = ((0, 0), (0, width - T))
    prompt = Prompt(_pad(tokens, pad, 0), _pad(positions, pad, -1))
    n_slots = n_prefix + width + max_new_tokens
    return prompt, n_slots if cfg.reach is None else min(n_slots, cfg.reach + min(width, CHUNK) - 1)


def _pad(part: Array | np.ndarray, pad: tuple, fill: int) -> Array:
    """In NumPy where that can be: JAX would compile it for each length of a prompt."""
    traced = isinstance(part, Tracer)
    padded = (jnp if traced else np).pad(part if traced else np.asarray(part), pad, constant_values=fill)
    return jnp.asarray(padded.astype(np.int32))


def _check_prefix(prefix: Cache | None, B: int) -> tuple[int, int]:
    """The slots of a prefix, and the most tokens that a row of it holds, where they can be seen."""
    if prefix is None:
        return 0, 0
    rows, n_slots = prefix.positions.shape
    require(rows in (1, B), f"prefix holds {rows} rows, tokens {B}: it must have one for all, or one for each")
    if isinstance(prefix.positions, Tracer):
        return n_slots, 0
    return n_slots, int(np.asarray(prefix.positions).max()) + 1


def _check_key(key: Any, drawn: bool, n_rows: int) -> None:
    require(not drawn or key is not None, "sampling needs key=jax.random.key(seed); without a temperature it is greedy")
    is_one = isinstance(key, jax.Array | np.ndarray | None)
    require(is_one, f"key={key!r:.60} is no key; give jax.random.key(seed)")
    if key is not None and is_by_row(cast(Any, key)):
        require(len(key) == n_rows, f"key holds {len(key)} keys; it must be one, or one for each of {n_rows} rows")


_PREFIX_RULE = "prefix_lm=True is for a decoder-only model that sees all, without a window; and without a prefix"
_MEMORY_RULE = {
    True: "memory=None: an encoder-decoder needs memory=model.apply({'params': params}, source, method='encode')",
    False: "memory is for an encoder-decoder; a decoder-only model takes none",
}


def check_positions(positions: Array | np.ndarray, shape: tuple[int, int]) -> None:
    """Hold positions, where their values can be seen, to those of texts that are padded on the right.

    Raises:
        InputError: another shape, or other positions.
    """
    require(positions.shape == shape, f"positions.shape={positions.shape} must be that of tokens, {shape}")
    if not isinstance(positions, Tracer):
        rows = np.asarray(positions)
        lengths = (rows >= 0).sum(axis=1, keepdims=True)
        index = np.arange(shape[1])
        right = (rows == np.where(index < lengths, index, -1)).all() and lengths.min() > 0
        require(right, "positions must be 0, 1, 2, … and then −1 in each row, with a token in each; see pad_prompts")
