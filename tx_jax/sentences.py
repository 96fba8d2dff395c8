"""Texts to vectors: the mean of an encoder's hidden vectors, by which texts of like meaning lie close together.

Source: Reimers & Gurevych 2019 (Sentence-BERT), §3, mean pooling.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tx_jax.data.subwords import Subwords
from tx_jax.errors import require
from tx_jax.models import DecoderLM, Encoder
from tx_jax.modules.embed import check_tokens

SHORTEST = 16  # tokens; batches are padded to this, or twice, four times, … as much, so that few shapes are compiled


def encode_text(
    model: Encoder | DecoderLM,
    params: dict,
    tokenizer: Subwords,
    texts: Sequence[str],
    *,
    max_len: int = 256,
    batch_size: int = 32,
    normalize: bool = True,
) -> Float[np.ndarray, "n D"]:
    """A float32 vector of each text, in their order.

    Args:
        max_len: tokens of a text that are read, with what the tokenizer puts around it.
        batch_size: texts at a time.
        normalize: to length 1, so that a product of two vectors is their cosine.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> from tx_jax.data.subwords import SubwordTokenizer
    >>> tokenizer = SubwordTokenizer.train("low lower lowest", vocab_size=260)
    >>> model = build(ModelConfig(stack="encoder", vocab_size=260, d_model=8, n_heads=2, n_layers=1))
    >>> encode_text(model, init_params(model, jax.random.key(0)), tokenizer, ["low", "slower"]).shape
    (2, 8)

    Raises:
        InputError: there is no text, max_len leaves no room or is longer than the model's, batch_size is below 1, or
            the tokenizer is of another model.
    Source: Reimers & Gurevych 2019 (Sentence-BERT), §3.
    """
    require(not isinstance(texts, str), f"texts={texts!r:.40} is one text; wrap it as [text]")
    require(len(texts), "texts=[]: give at least one text")
    wrong = [text for text in texts if not isinstance(text, str)]
    require(not wrong, f"texts holds {wrong[:1]!r:.40}, which is no text; give strings")
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    frame, longest = tokenizer.encode("", add_special_tokens=True), model.cfg.max_len
    rule = f"max_len={max_len} must be from {len(frame) + 1}, room for a token, to {longest}, the model's max_len"
    require(len(frame) < max_len <= longest, rule)
    rows = [_cut(tokenizer.encode(text, add_special_tokens=True), frame, max_len) for text in texts]
    order = np.argsort([len(row) for row in rows], kind="stable")  # so that those of one batch are of like length
    vectors = np.empty((len(rows), model.cfg.d_model), np.float32)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        width = min(_power(len(rows[chosen[-1]]), SHORTEST), max_len)
        tokens, positions = _pad([rows[i] for i in chosen], min(_power(len(chosen)), batch_size), width)
        check_tokens(tokens, model.cfg.vocab_size or 0)
        vectors[chosen] = _pooled(model, params, tokens, positions)[: len(chosen)]
    if normalize:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def _cut(ids: np.ndarray, frame: np.ndarray, max_len: int) -> np.ndarray:
    """The first ids of a text, with what comes after it, as `[SEP]`: what of the frame is not before it."""
    if len(ids) <= max_len:
        return ids
    before = next((i for i, one in enumerate(frame) if ids[i] != one), len(frame))
    after = frame[before:]
    return np.concatenate([ids[: max_len - len(after)], after])


def _power(n: int, least: int = 1) -> int:
    """`least`, doubled until it is n or more."""
    return least << (-(-n // least) - 1).bit_length() if n else least


def _pad(rows: list[np.ndarray], n_rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((n_rows, width), np.int32)
    positions = np.full((n_rows, width), -1, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        positions[i, : len(row)] = np.arange(len(row))
    return tokens, positions


@functools.partial(jax.jit, static_argnums=0)
def _pooled(
    model: Encoder | DecoderLM, params: dict, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, "B D"]:
    """The mean over real tokens; of none, zeros."""
    x, _ = model.apply({"params": params}, tokens, positions, method="hidden")
    real = (positions >= 0).astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", x.astype(jnp.float32), real)
    return total / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
