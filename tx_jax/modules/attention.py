"""Multi-head attention: projections around `ops.attention`. Self- and cross-attention differ only in where the keys
and values come from: this sequence (and its cache), or an encoder's output."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from tx_jax.cache import LayerCache, write_layer
from tx_jax.config import ModelConfig
from tx_jax.errors import require
from tx_jax.modules.linear import Linear
from tx_jax.modules.norms import make_qk_norm
from tx_jax.ops.attention import laid_attention, scores
from tx_jax.ops.masks import Mask
from tx_jax.ops.positions import Rotation, rotate

NAMES = ("queries", "keys_values", "attended")  # of what remat by names keeps
MOST = 16  # beams of a sentence that are attended one after another on a CPU: each is a product of its own to compile


class Sinks(NamedTuple):
    """The first tokens of a text, which are seen as if they were just before the window (Xiao et al. 2023, §3.2)."""

    turn: Rotation | None  # of the queries, for these keys
    here: Bool[Array, "b n"]  # which of the first n keys they are


class Plan(NamedTuple):
    """What one forward pass works out once for all layers: who sees whom, and how positions enter."""

    mask: Mask
    bias: Float[Array, "b N T S"] | None = None
    turn: Rotation | None = None
    slots: Int[Array, "B T"] | None = None  # where new keys go in the cache
    sinks: Sinks | None = None


class Attention(nn.Module):
    """Vaswani et al. 2017, §3.2.2; grouped queries (Ainslie et al. 2023) where cfg.n_kv_heads < cfg.n_heads."""

    cfg: ModelConfig

    def setup(self) -> None:
        cfg = self.cfg
        sizes = {"q": cfg.n_heads * cfg.H, "k": cfg.K * cfg.H, "v": cfg.K * cfg.Hv}
        if self.has_variable("params", "qkv"):  # by `fuse`
            self.qkv = Linear(cfg, sum(sizes.values()), "qkv")
        else:
            self.q, self.k, self.v = (Linear(cfg, size, "qkv") for size in sizes.values())
        self.out = Linear(cfg, cfg.d_model, "out", residual=True)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = make_qk_norm(cfg), make_qk_norm(cfg)

    def keys_values(self, x: Float[Array, "B S D"]) -> LayerCache:
        """The keys and values of x, as a cache of S slots."""
        return self._keys_values(self.k(x), self.v(x), None)

    def _keys_values(self, k: Array, v: Array, turn: Rotation | None) -> LayerCache:
        cfg = self.cfg
        k = k.reshape(*k.shape[:2], cfg.K, cfg.H)
        v = v.reshape(*v.shape[:2], cfg.K, cfg.Hv)
        k = self.k_norm(k) if cfg.qk_norm else k
        k = rotate(k, turn, interleaved=cfg.positions == "rotary_pairs")
        return LayerCache(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))

    def attend(
        self, x: Float[Array, "B T D"], memory: LayerCache, plan: Plan, deterministic: bool
    ) -> Float[Array, "B T D"]:
        """The queries of x over the keys and values of `memory`.

        A memory of fewer rows serves each to B / rows rows of x in turn, such as the beams of one sentence: they are
        further queries of that row, so that it is never copied, and on an accelerator read once.

        Raises:
            InputError: B is no multiple of the memory's rows.
        """
        return self._attend(self.q(x), memory, plan, deterministic)

    def _attend(self, q: Array, memory: LayerCache, plan: Plan, deterministic: bool) -> Array:
        cfg, rows, B = self.cfg, memory.k.shape[0], len(q)
        rule = f"memory holds {rows} rows, x {B}"
        require(B % rows == 0, f"{rule}: x must have as many, or a multiple; encode one source for each row")
        q = q.reshape(*q.shape[:2], cfg.n_heads, cfg.H)
        q = self.q_norm(q) if cfg.qk_norm else q
        heads = self.heads(q, memory, plan, deterministic)
        return self.out(checkpoint_name(heads, "attended").reshape(*q.shape[:2], -1))

    def heads(self, q: Array, memory: LayerCache, plan: Plan, deterministic: bool) -> Array:
        """What each head of (B, T, N, H) queries attends to, row by row of the memory."""
        cfg, (k, v), (B, T) = self.cfg, memory, q.shape[:2]
        rows, scale = k.shape[0], cfg.score_scale
        q, k, bias = self._turned(q, k, plan, scale)
        drop = cfg.attention_dropout_rate > 0 and not deterministic
        one_by_one = rows < B <= MOST * rows and T == 1 and jax.default_backend() == "cpu"
        q, k, v = checkpoint_name(q, "queries"), *checkpoint_name((k, v), "keys_values")
        return laid_attention(
            q.reshape(rows, -1, *q.shape[2:]), k, v, plan.mask, bias,
            scale=scale,
            soft_cap=cfg.attention_soft_cap,
            dropout_rate=cfg.attention_dropout_rate,
            dropout_key=self.make_rng("dropout") if drop else None,
            impl="by_query" if one_by_one else "auto",
        )  # fmt: skip

    def _turned(self, q: Array, k: Any, plan: Plan, scale: float) -> tuple[Array, Any, Array | None]:
        """q turned by its position, with the keys and the bias by which sinks score as another turn of q would."""
        pairs = self.cfg.positions == "rotary_pairs"
        turned = rotate(q, plan.turn, interleaved=pairs)
        if plan.sinks is None or plan.sinks.turn is None:
            return turned, k, plan.bias
        here = plan.sinks.here
        n, apart = here.shape[1], rotate(q, plan.sinks.turn, interleaved=pairs) - turned
        if n == k.shape[3]:  # no cache: heads twice as wide, so that nothing grows with T · S
            k = jnp.concatenate([k, jnp.where(here[:, None, None], k, 0)], axis=2)
            return jnp.concatenate([turned, apart], axis=-1), k, plan.bias
        first = jax.tree.map(lambda leaf: leaf[..., :n], k).astype(q.dtype)
        more = scores(apart, first, scale)
        more = jnp.where(here[:, None, None], more.reshape(len(q), q.shape[2], -1, n), 0)
        return turned, k, jnp.pad(more, ((0, 0), (0, 0), (0, 0), (0, k.shape[3] - n)))

    def __call__(
        self, x: Float[Array, "B T D"], plan: Plan, cache: LayerCache | None, deterministic: bool
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Self-attention over x and, where there is a cache, over what it holds."""
        cfg = self.cfg
        if self.has_variable("params", "qkv"):
            q, k, v = jnp.split(self.qkv(x), [cfg.n_heads * cfg.H, (cfg.n_heads + cfg.K) * cfg.H], axis=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        new = self._keys_values(k, v, plan.turn)
        if cache is not None:
            new = cache = write_layer(cache, new, cast(Array, plan.slots))  # slots are given with every cache
        return self._attend(q, new, plan, deterministic), cache
