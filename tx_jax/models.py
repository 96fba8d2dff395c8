"""The three models: an encoder, a decoder-only language model, and the encoder-decoder of 2017.

Each is embeddings, stacks and a head. A forward returns (logits, cache) always; without a cache the second is None.
`logits(hidden(…))` is a forward, and both halves are public: a prefill asks for the logits of one row only.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tx_jax.cache import Cache
from tx_jax.config import ModelConfig
from tx_jax.errors import require
from tx_jax.modules.block import KEPT, Stack
from tx_jax.modules.embed import Embed, Head
from tx_jax.modules.linear import TABLE_INITS, Linear


class DecoderLM(nn.Module):
    """A causal language model: GPT-2, LLaMA and their kin.

    >>> model = DecoderLM(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params, tokens = init_params(model, jax.random.key(0)), jnp.array([[5, 6, 4]])
    >>> logits, cache = jax.jit(model.apply)({"params": params}, tokens)
    >>> logits.shape, cache
    ((1, 3, 7), None)

    Raises:
        InputError: in a call, ids outside of the vocabulary where they can be seen, more tokens than learned positions
            or slots, or a cache with segments or with stacked layers.
    Source: Radford et al. 2019 (GPT-2), §2.3; Touvron et al. 2023 (LLaMA), §2.2.
    """

    cfg: ModelConfig
    remat: str = "none"  # what a block keeps for its gradient (KEPT of modules.block)

    def setup(self) -> None:
        self.embed, self.head = Embed(self.cfg), Head(self.cfg)
        self.stack = Stack(self.cfg, self.cfg.n_layers, causal=True, remat=self.remat)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        *,
        segments: Int[Array, "#B T"] | None = None,
        prefix: Int[Array, " B"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden vectors, and the cache with the new tokens' keys and values.

        Args:
            positions: −1 where there is no token; None: 0, 1, 2, … or, with a cache, where each row goes on.
            segments: numbers of packed documents, which do not see each other.
            prefix: tokens a row whose whole is seen by every query (prefix-LM).
            deterministic: no dropout; otherwise pass `rngs={"dropout": key}` to apply.
        """
        x = self.embed(tokens)
        return self.stack(
            x, positions, segments=segments, prefix=prefix, cache=cache, deterministic=deterministic
        )  # fmt: skip

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 logits of hidden vectors."""
        return self.head(hidden, self.embed)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        *,
        segments: Int[Array, "#B T"] | None = None,
        prefix: Int[Array, " B"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Logits of the token after each token, and the cache. Arguments are those of `hidden`."""
        x, cache = self.hidden(
            tokens, positions, segments=segments, prefix=prefix, cache=cache, deterministic=deterministic
        )  # fmt: skip
        return self.logits(x), cache


class Encoder(nn.Module):
    """A bidirectional encoder: BERT and its kin.

    >>> model = Encoder(ModelConfig(stack="encoder", vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params, tokens = init_params(model, jax.random.key(0)), jnp.array([[5, 6, 4]])
    >>> jax.jit(model.apply)({"params": params}, tokens)[0].shape
    (1, 3, 7)

    Raises:
        InputError: in a call, ids outside of the vocabulary where they can be seen, or more tokens than learned
            positions.
    Source: Devlin et al. 2019 (BERT), §3.
    """

    cfg: ModelConfig
    remat: str = "none"  # what a block keeps for its gradient (KEPT of modules.block)

    def setup(self) -> None:
        cfg = self.cfg
        self.embed, self.head = Embed(cfg), Head(cfg)
        self.stack = Stack(cfg, cfg.n_layers, causal=False, remat=self.remat)
        if cfg.n_token_types:
            self.types = self.param("types", TABLE_INITS[cfg.init](cfg.d_model), (cfg.n_token_types, cfg.d_model))
        if cfg.pooler:
            self.pool = Linear(cfg, cfg.d_model, "out")

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        *,
        segments: Int[Array, "#B T"] | None = None,
        types: Int[Array, "#B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], None]:
        """Hidden vectors (and no cache). `types` are BERT's sentence numbers; None: all 0."""
        x = self.embed(tokens)
        if self.cfg.n_token_types:
            x += self.types.astype(x.dtype)[jnp.zeros_like(tokens) if types is None else types]
        return self.stack(x, positions, segments=segments, deterministic=deterministic)[0], None

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 logits of hidden vectors."""
        return self.head(hidden, self.embed)

    def pooled(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """tanh of a map of the first vector. Source: Devlin et al. 2019, and its code."""
        return jnp.tanh(self.pool(hidden[:, 0]))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        *,
        segments: Int[Array, "#B T"] | None = None,
        types: Int[Array, "#B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], None]:
        """Logits of each token, and None."""
        x, _ = self.hidden(tokens, positions, segments=segments, types=types, deterministic=deterministic)
        if self.cfg.pooler and self.is_initializing():
            self.pooled(x)  # so that its parameters are born with the others
        return self.logits(x), None


class EncoderDecoder(nn.Module):
    """The Transformer of Vaswani et al. 2017: an encoder, and a decoder that attends to it.

    >>> model = EncoderDecoder(ModelConfig(stack="encoder_decoder", vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params, source, tokens = init_params(model, jax.random.key(0)), jnp.array([[5, 6, 4]]), jnp.array([[1, 3]])
    >>> jax.jit(model.apply)({"params": params}, source, tokens)[0].shape
    (1, 2, 7)

    Raises:
        InputError: in a call, ids outside of the vocabulary where they can be seen, more tokens than learned positions
            or slots, a cache with stacked layers, or rows of the target that are no multiple of those of the source.
    Source: Vaswani et al. 2017, §3.1.
    """

    cfg: ModelConfig
    remat: str = "none"  # what a block keeps for its gradient (KEPT of modules.block)

    def setup(self) -> None:
        cfg = self.cfg
        self.embed, self.head = Embed(cfg), Head(cfg)
        self.source_embed = self.embed if cfg.tie_source else Embed(cfg)
        self.encoder = Stack(cfg, cfg.n_encoder_layers or cfg.n_layers, causal=False, remat=self.remat)
        self.decoder = Stack(cfg, cfg.n_layers, causal=True, cross=True, remat=self.remat)

    def encode(
        self,
        source: Int[Array, "B S"],
        positions: Int[Array, "#B S"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Cache:
        """The source as keys and values for every block of the decoder, computed once (memory)."""
        x, _ = self.encoder(self.source_embed(source), positions, deterministic=deterministic)
        index = jnp.arange(source.shape[1])[None] if positions is None else positions
        return self.decoder.memory(x, jnp.broadcast_to(index, source.shape))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        *,
        memory: Cache | None = None,
        source: Int[Array, "B S"] | None = None,
        source_positions: Int[Array, "#B S"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden vectors of the decoder, and the cache. `memory` is what `encode` gave; without one, source is encoded.

        Raises:
            InputError: neither memory nor source is given.
        """
        if memory is None:
            require(source is not None, "memory=None needs a source; give what encode gave, or the source itself")
            memory = self.encode(cast(Array, source), source_positions, deterministic=deterministic)
        return self.decoder(self.embed(tokens), positions, cache=cache, memory=memory, deterministic=deterministic)

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 logits of hidden vectors."""
        return self.head(hidden, self.embed)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        *,
        memory: Cache,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Logits of the token after each target token, and the cache."""
        x, cache = self.hidden(tokens, positions, memory=memory, cache=cache, deterministic=deterministic)
        return self.logits(x), cache

    def __call__(
        self,
        source: Int[Array, "B S"],
        tokens: Int[Array, "B T"],
        source_positions: Int[Array, "#B S"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Logits of the token after each target token, and None."""
        x, cache = self.hidden(
            tokens, positions, source=source, source_positions=source_positions, deterministic=deterministic
        )  # fmt: skip
        return self.logits(x), cache


MODELS = {"decoder": DecoderLM, "encoder": Encoder, "encoder_decoder": EncoderDecoder}
Model = DecoderLM | Encoder | EncoderDecoder
STACKS = ("stack", "encoder", "decoder")  # the names of their stacks among their parameters


def build(cfg: ModelConfig, remat: str = "none") -> Model:
    """The model that cfg describes.

    Args:
        remat: what each block computes again for its gradient, to save memory (KEPT of modules.block): none; full; all
            but "dots", products with its kernels; all but "names", what goes into its attention and comes out.

    Raises:
        InputError: there is no such remat.

    >>> type(build(ModelConfig(vocab_size=11))).__name__
    'DecoderLM'
    """
    require(remat in KEPT, f"remat={remat!r} is not one of {', '.join(KEPT)}")
    return MODELS[cfg.stack](cfg, remat)


def init_params(model: Model, key: PRNGKeyArray) -> dict:
    """A fresh float32 parameter tree; under `jax.eval_shape`, its shapes alone.

    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> init_params(model, jax.random.key(0))["embed"]["table"].shape
    (7, 8)

    Raises:
        InputError: the config has no vocab_size yet.
    """
    token = jnp.zeros((1, 1), jnp.int32)
    inputs = (token, token) if isinstance(model, EncoderDecoder) else (token,)
    return jax.jit(model.init)(key, *inputs)["params"]  # compiled, the forward pass itself is left out


def count_params(cfg: ModelConfig) -> int:
    """How many parameters a model of this config has; nothing is allocated.

    >>> count_params(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    848

    Raises:
        InputError: the config has no vocab_size yet.
    """
    shapes = jax.eval_shape(lambda key: init_params(build(cfg), key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
