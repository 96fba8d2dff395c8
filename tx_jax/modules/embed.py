"""Tokens to vectors, and vectors to logits: the two ends of a model, which may share one table."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from tx_jax.config import ModelConfig
from tx_jax.errors import require
from tx_jax.modules.linear import TABLE_INITS, Linear, product
from tx_jax.modules.mlp import ACTIVATIONS
from tx_jax.modules.norms import make_norm
from tx_jax.ops.spread import gathered


def check_tokens(tokens: Any, vocab_size: int, name: str = "tokens") -> Array | np.ndarray:
    """Ids as an array, held to (B, T) integers in [0, vocab_size) where their values can be seen: outside of `jit`.

    Raises:
        InputError: another shape or dtype, no tokens, or an id outside of the vocabulary.
    """
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    require(tokens.ndim == 2, f"{name}.shape={tokens.shape} must be (batch, length); wrap one row as [row]")
    require(jnp.issubdtype(tokens.dtype, jnp.integer), f"{name}.dtype={tokens.dtype} must be an integer")
    require(tokens.size, f"{name}.shape={tokens.shape} holds no token; give at least one a row")
    if not isinstance(tokens, Tracer) and getattr(tokens, "is_fully_addressable", True):
        values = np.asarray(tokens)  # not tokens.min(), which inside a jit that closes over them is traced
        low, high = int(values.min()), int(values.max())
        bad = low if low < 0 else high
        require(low >= 0 and high < vocab_size, f"{name} holds id {bad}; the vocabulary is 0 … {vocab_size - 1}")
    return tokens


class Embed(nn.Module):
    """A (V, D) table of token vectors."""

    cfg: ModelConfig

    def setup(self) -> None:
        cfg = self.cfg
        require(cfg.vocab_size is not None, "vocab_size=None: set it, or let train.py take it from the tokenizer")
        init = TABLE_INITS[cfg.init](cfg.d_model)
        self.table = self.param("table", init, (cfg.vocab_size, cfg.d_model))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vectors of tokens, × √D if cfg.scale_embeddings. Inside `jit`, ids that are not in [0, V) go unseen."""
        ids = check_tokens(tokens, cast(int, self.cfg.vocab_size))
        scale = self.cfg.d_model**0.5 if self.cfg.scale_embeddings else 1.0
        rows = jax.tree.map(lambda leaf: gathered(leaf)[ids], self.table)  # before the cast: of those alone
        return rows.astype(self.cfg.dtype) * jnp.asarray(scale, self.cfg.dtype)

    def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """The dot product of x with every token's vector."""
        return product(x, self.table, x.dtype, jnp.float32)


class Head(nn.Module):
    """Hidden vectors to float32 logits, by the token table if cfg.tie_head, otherwise by a map of its own.

    BERT's, with cfg.head_transform, has a map, the activation and a norm before that.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"], embed: Embed) -> Float[Array, "*b V"]:
        cfg = self.cfg
        if cfg.scale_head:
            x = x * jnp.asarray(cfg.d_model**-0.5, x.dtype)
        if cfg.head_transform:
            activation, _ = ACTIVATIONS[cfg.mlp]
            x = make_norm(cfg, name="norm")(activation(Linear(cfg, cfg.d_model, "out", name="transform")(x)))
        own = Linear(cfg, cast(int, cfg.vocab_size), "head", out_dtype="float32", name="map")
        logits = embed.logits(x) if cfg.tie_head else own(x)
        logits /= cfg.width_ratio  # muP's output multiplier (Yang et al. 2022, table 8)
        if cfg.head_bias:
            logits += self.param("bias", nn.initializers.zeros, (cfg.vocab_size,)).astype(jnp.float32)
        cap = cfg.head_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
