"""One block, and a stack of them: encoder, decoder-only and the decoder of an encoder-decoder are this with other
arguments (not causal; causal; causal with cross-attention)."""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from tx_jax.cache import Cache, LayerCache, slots_of, write
from tx_jax.config import ModelConfig
from tx_jax.errors import require
from tx_jax.modules.attention import NAMES, Attention, Plan, Sinks
from tx_jax.modules.mlp import MLP
from tx_jax.modules.moe import LOSSES, Experts
from tx_jax.modules.norms import make_norm
from tx_jax.modules.positions import SCHEMES
from tx_jax.ops.masks import Mask
from tx_jax.ops.spread import spread


class Block(nn.Module):
    """x + self-attention, if cross x + cross-attention, x + feed-forward, with norms before or after."""

    cfg: ModelConfig
    cross: bool = False

    def setup(self) -> None:
        cfg = self.cfg
        self.attention, self.attention_norm = Attention(cfg), make_norm(cfg)
        if self.cross:
            self.cross_attention, self.cross_norm = Attention(cfg), make_norm(cfg)
        self.mlp, self.mlp_norm = Experts(cfg) if cfg.n_experts else MLP(cfg), make_norm(cfg)
        if cfg.norm_order == "sandwich":
            self.attention_out_norm, self.mlp_out_norm = make_norm(cfg), make_norm(cfg)
            if self.cross:
                self.cross_out_norm = make_norm(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        plan: Plan,
        cache: LayerCache | None = None,
        memory: LayerCache | None = None,
        cross_plan: Plan | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """x after this block, and the cache with this block's new keys and values."""

        order, start = self.cfg.norm_order, x

        def residual(name: str, x: Array, read: Array, sublayer: Callable) -> tuple[Array, LayerCache | None]:
            norm = getattr(self, f"{name}_norm")
            y, cache = sublayer(read if order == "post" else norm(read))
            y = getattr(self, f"{name}_out_norm")(y) if order == "sandwich" else y
            x = spread(x) + self.dropout(y, deterministic=deterministic)
            return (norm(x) if order == "post" else x), cache

        x, cache = residual("attention", x, x, lambda h: self.attention(h, plan, cache, deterministic))
        if self.cross:
            attend: Any = self.cross_attention.attend
            x, _ = residual("cross", x, x, lambda h: (attend(h, memory, cross_plan, deterministic), None))
        feed: Any = functools.partial(self.mlp, positions=plan.mask.q_positions, deterministic=deterministic)
        x, _ = residual("mlp", x, start if self.cfg.parallel else x, lambda h: (feed(h), None))
        return x, cache


# One block is traced for all of a stack: thirty blocks in half the time, of the same compiled program.
TracedOnce = nn.jit(Block, static_argnames="deterministic")

KEPT: dict[str, Any] = {  # what a block keeps for its gradient; the rest is computed again
    "none": jax.checkpoint_policies.everything_saveable,  # no remat: nothing is
    "full": jax.checkpoint_policies.nothing_saveable,  # what goes into the block
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with kernels, not those in attention
    "names": jax.checkpoint_policies.save_only_these_names(*NAMES),  # queries, keys, values and what attention gives
}


class Stack(nn.Module):
    """Token vectors to hidden vectors: positions, n blocks and, unless post-norm, a last norm.

    Blocks are a loop over `blocks_0`, `blocks_1`, …; those that `stack_layers` put into `scanned` are a scan before it.
    """

    cfg: ModelConfig
    n_layers: int
    causal: bool
    cross: bool = False
    remat: str = "none"  # a key of KEPT

    def setup(self) -> None:
        cfg = self.cfg
        self.positions = SCHEMES[cfg.positions](cfg, self.causal)
        self.blocks = [TracedOnce(cfg, self.cross) for _ in range(self.n_layers)]
        self.dropout = nn.Dropout(cfg.dropout_rate)
        if cfg.norm_embeddings:
            self.first_norm = make_norm(cfg)
        if cfg.norm_order != "post":
            self.last_norm = make_norm(cfg)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"] | None = None,
        *,
        segments: Int[Array, "#B T"] | None = None,
        prefix: Int[Array, " B"] | None = None,
        cache: Cache | None = None,
        memory: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden vectors, and the cache with everything new in it (None without one)."""
        cfg, (B, T, _) = self.cfg, x.shape
        slots, k_positions = None, positions
        if cache is not None:
            require(
                cache.positions.shape[1] >= T, f"{T} tokens do not fit the cache's {cache.positions.shape[1]} slots"
            )
            require(segments is None, "segments and cache do not go together: decode one document a row")
            if positions is None:
                positions = cache.next_positions()[:, None] + jnp.arange(T)
            positions = jnp.broadcast_to(positions, (B, T))
            _check_room(positions, cache.positions.shape[1], cfg.reach)
            slots = slots_of(positions, cache.positions.shape[1], cfg.n_sinks)
            k_positions = write(cache.positions, positions, slots)
        index = jnp.arange(T)[None] if positions is None else positions
        k_index = index if k_positions is None else k_positions
        bias, sinks, plans = self.positions.bias(index, k_index), None, {}
        if cfg.n_sinks:
            near = jnp.minimum(index, cast(int, cfg.reach) - 1)  # where a query is in what it sees
            first = (k_index >= 0) & (k_index < cfg.n_sinks)
            if bias is not None:
                bias = jnp.where(first[:, None, None], self.positions.bias(near, k_index), bias)
            sinks = Sinks(
                self.positions.turn(near, True),
                first if cache is None else first[:, : min(cfg.n_sinks, first.shape[1] - 1)],
            )
        for kind in set(cfg.window_pattern):
            mask = Mask(
                causal=self.causal, window=cfg.window if kind == "w" else None, n_sinks=cfg.n_sinks, prefix=prefix,
                q_positions=positions, k_positions=k_positions, q_segments=segments, k_segments=segments,
            )  # fmt: skip
            turn = self.positions.turn(index, kind == "w" and cfg.window is not None)
            plans[kind] = Plan(mask, bias, turn, slots, sinks)
        cross_plan = Plan(Mask(k_positions=None if memory is None else memory.positions))

        x = self.positions.add(x, index)
        x = self.first_norm(x) if cfg.norm_embeddings else x
        x = spread(self.dropout(x, deterministic=deterministic))
        if scanned := self._scanned():
            require(cache is None, "parameters are stacked for training, and a cache is not; use unstack_layers")
            x = self._scan(scanned, x, plans, memory, cross_plan, deterministic)

        def call(block: Block, *args: Any) -> tuple[Array, LayerCache | None]:
            return block(*args, deterministic=deterministic)

        call = call if self.remat == "none" else nn.remat(call, policy=KEPT[self.remat])
        layers, n = [], self.n_layers
        for i in range(self._n_scanned(), n):
            layer = None if cache is None else cache.layers[i]
            source = None if memory is None else memory.layers[i - n]
            plan = plans[cfg.window_pattern[i % len(cfg.window_pattern)]]
            x, layer = call(self.blocks[i], x, plan, layer, source, cross_plan)
            layers.append(layer)
        x = spread(x)
        x = self.last_norm(x) if cfg.norm_order != "post" else x
        return x, None if cache is None else cache._replace(layers=tuple(layers), positions=k_positions)

    def memory(self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]) -> Cache:
        """An encoder's output as the keys and values of every block's cross-attention."""

        def keys_values(block: Any, x: Array) -> LayerCache:
            return block.cross_attention.keys_values(x)

        block = Block(self.cfg, self.cross, parent=None)
        one = lambda params: block.apply({"params": params}, x, method=keys_values)  # noqa: E731
        scanned = tuple(jax.lax.map(one, layers) for layers in self._scanned().values())
        rest = (keys_values(block, x) for block in self.blocks[self._n_scanned() :])
        layers: Any = (scanned, *rest) if scanned else tuple(rest)  # a scan's are one
        return Cache(layers, positions)

    def _scanned(self) -> dict[str, Any]:
        """The parameters of the layers that are scanned, by their place in the window pattern; each leaf of all."""
        return cast(dict, self.get_variable("params", "scanned", {}))

    def _n_scanned(self) -> int:
        leaves = jax.tree.leaves(self._scanned())
        return len(leaves[0]) * len(self.cfg.window_pattern) if leaves else 0

    def _scan(
        self, params: dict, x: Array, plans: dict, memory: Cache | None, cross_plan: Plan, deterministic: bool
    ) -> Array:
        block, pattern = Block(self.cfg, self.cross, parent=None), self.cfg.window_pattern
        n_steps = self._n_scanned() // len(pattern)
        keys = jax.random.split(self.make_rng("dropout"), n_steps) if self.has_rng("dropout") else None

        def step(x: Array, layers: Any) -> tuple[Array, Any]:
            (params, sources, key), left = layers, []
            for i, kind in enumerate(pattern):
                (x, _), more = block.apply(
                    {"params": params[str(i)]}, x, plans[kind], None, sources[i], cross_plan,
                    deterministic=deterministic,
                    rngs={} if key is None else {"dropout": jax.random.fold_in(key, i)},
                    mutable=[LOSSES],
                )  # fmt: skip
                left.append(more.get(LOSSES, {}))
            return x, left

        if self.remat != "none":
            step = jax.checkpoint(step, policy=KEPT[self.remat], prevent_cse=False)
        sources = (None,) * len(pattern) if memory is None else memory.layers[0]
        x, left = jax.lax.scan(step, x, (params, sources, keys))
        for leaf in jax.tree.leaves(left):
            self.sow(LOSSES, "scanned", leaf.sum(0), reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(2))
        return x


def _check_room(positions: Array, n_slots: int, window: int | None) -> None:
    """Hold what is written to what leaves every key that a query sees in its slot, where values can be seen."""
    T = positions.shape[1]
    if isinstance(positions, Tracer) or (window is not None and n_slots >= window + T - 1):
        return
    last = int(np.asarray(positions).max())
    needs = "a window" if window is None else f"window + {T - 1} = {window + T - 1} slots"
    rule = f"position {last} does not fit a cache of n_slots={n_slots}, and going round needs {needs}"
    require(last < n_slots, f"{rule}; make n_slots at least {last + 1}")
