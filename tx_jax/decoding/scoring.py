"""How likely a model finds a text: the log-probability of each token, and the perplexity of a long text by windows."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tx_jax.cache import Cache
from tx_jax.decoding.generate import hidden_of, logits_of
from tx_jax.decoding.prompts import LanguageModel, check_positions, pad_prompts
from tx_jax.errors import require
from tx_jax.models import DecoderLM
from tx_jax.modules.embed import check_tokens

PART = 128  # positions whose logits are there at a time


class Perplexity(NamedTuple):
    """Of a text, as a model finds it.

    >>> found = Perplexity(perplexity=2.0, nats_per_token=float(np.log(2)), n_tokens=8)
    >>> round(found.nats_per_token * found.n_tokens / np.log(2))  # bits of the whole text
    8
    """

    perplexity: float  # exp(nats_per_token)
    nats_per_token: float
    n_tokens: int  # that were predicted: all but the first


def score(
    model: LanguageModel,
    params: dict,
    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"],
    positions: Int[Array, "B T"] | Int[np.ndarray, "B T"] | None = None,
    *,
    memory: Cache | None = None,
) -> Float[Array, "B T"]:
    """log p(token | the tokens before it), in nats; 0 for a row's first token and for padding.

    Args:
        tokens, positions: texts, padded on the right; `pad_prompts` makes both. Positions None: no padding.
        memory: an EncoderDecoder's `encode(source)`.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> score(model, init_params(model, jax.random.key(0)), jnp.ones((1, 3), int)).shape
    (1, 3)

    Raises:
        InputError: ids outside of the vocabulary, positions that are not those of texts that are padded on the right,
            or more tokens than the model has positions.
    """
    tokens = check_tokens(tokens, cast(int, model.cfg.vocab_size))
    (B, T), most = tokens.shape, model.cfg.max_len
    require(most >= T, f"tokens has {T} columns, max_len={most}; use `perplexity`, which goes by windows")
    tokens, index = jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(T), (B, T))
    positions = index if positions is None else jnp.asarray(positions)
    check_positions(positions, (B, T))
    x, _ = hidden_of(model, params, tokens, positions, None, memory)
    return _log_probs(model, params, x, tokens, positions)


def _log_probs(model: LanguageModel, params: dict, x: Array, tokens: Array, positions: Array) -> Float[Array, "B T"]:
    """Of each token by the hidden vector before it; a part of the logits at a time."""
    (B, T), width = tokens.shape, -(-tokens.shape[1] // PART) * PART

    def parts(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, width - T), *[(0, 0)] * (array.ndim - 2)))
        return padded.reshape(B, -1, PART, *array.shape[2:]).swapaxes(0, 1)

    def one(part: Any) -> Array:
        x, token = part
        here = logits_of(model, params, x).astype(jnp.float32)
        return jnp.take_along_axis(here, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(here, axis=-1)

    follows = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    found = jax.lax.map(one, (parts(x), parts(follows))).swapaxes(0, 1).reshape(B, width)[:, :T]
    return jnp.where(positions > 0, jnp.roll(found, 1, axis=1), 0.0)


def perplexity(
    model: DecoderLM,
    params: dict,
    ids: Sequence[int] | Int[np.ndarray, " T"],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """The perplexity of a text of any length: each token but the first is predicted once.

    Args:
        window: tokens that are read at a time; None: model.cfg.max_len, but at most 1,024.
        stride: tokens from a window's beginning to the next one's; None: half a window, so that a token has at least as
            many before it. window − 1, the most, is the fastest.
        batch_size: windows at a time.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params = jax.tree.map(jnp.zeros_like, init_params(model, jax.random.key(0)))  # which finds all tokens alike
    >>> f"{perplexity(model, params, [5, 6, 4]).perplexity:.2f}"
    '7.00'

    Raises:
        InputError: fewer than two tokens, ids outside of the vocabulary, or a number out of its bounds.
    """
    most, ids = model.cfg.max_len, np.asarray(ids)
    window = min(most, 1024) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    require(ids.ndim == 1 and len(ids) >= 2, f"ids of shape {ids.shape} must be one text of at least two tokens")
    require(2 <= window <= most, f"window={window} must be from 2 to max_len={most}")
    # A window's first token is predicted by no window unless the one before holds it.
    require(1 <= stride < window, f"stride={stride} must be from 1 to {window - 1}, below window={window}")
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    check_tokens(ids[None], cast(int, model.cfg.vocab_size))
    starts = range(0, max(len(ids) - window, 0) + stride, stride)
    total, read = 0.0, 1
    for first in range(0, len(starts), batch_size):
        rows = [ids[start : start + window] for start in starts[first : first + batch_size]]
        padded = pad_prompts([row.tolist() for row in rows + rows[-1:] * (batch_size - len(rows))], window)
        found = np.asarray(_score(model, params, *padded), np.float64)
        for row, start in zip(found, starts[first : first + batch_size], strict=False):
            total += row[read - start :].sum()
            read = min(start + window, len(ids))
    mean = -total / (len(ids) - 1)
    return Perplexity(float(np.exp(mean)), mean, len(ids) - 1)


_score = functools.partial(jax.jit, static_argnums=0)(score)
