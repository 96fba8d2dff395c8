"""A mixture of experts in the place of a feed-forward: each token is read by the few that its router chooses.

Kernels are (E, out, in). Rows are sorted by expert and multiplied in groups or, with a capacity, laid into so many
slots of each expert and sequence, which is as much work however they are chosen.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tx_jax.config import ModelConfig
from tx_jax.modules.linear import KERNEL_INITS, Linear
from tx_jax.modules.mlp import ACTIVATIONS
from tx_jax.ops.spread import over_experts

LOSSES = "losses"  # the collection of what training adds to the loss: (balance, squares of the router's normaliser)


class Routed(NamedTuple):
    """Where each token goes, by choice (k), the likeliest expert first."""

    expert: Int[Array, "B T k"]  # E: nowhere
    rank: Int[Array, "B T k"]  # of this choice among those of its expert in the sequence
    weight: Float[Array, "B T k"]


class Experts(nn.Module):
    """Σ over the k likeliest experts of p_e · expert_e(x), p being their softmax (Jiang et al. 2024, §2.1).

    In training, what a step adds to the loss is left in the collection LOSSES: for each sequence, times its tokens, the
    balance of Fedus et al. 2022, eq. 4, which is 1 where all experts are chosen alike; and the sum of squares of
    ln Σ exp(router logits) (Zoph et al. 2022, eq. 5). Sums over sequences do not depend on how a batch is shared.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"] | None = None, *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        """Tokens of position −1 take nobody's place. Capacity holds in training alone (not deterministic)."""
        cfg, (B, T, _) = self.cfg, x.shape
        # A variable, not a parameter, of which flax would ask that quantize changes nothing
        kernels: Any = self.variable("params", "experts", lambda: self._init(self.make_rng("params"))).value
        logits = Linear(cfg, cfg.E, "router", out_dtype="float32", name="router")(x)
        here = jnp.ones((B, T), bool) if positions is None else jnp.broadcast_to(positions >= 0, (B, T))
        routed = route(logits, here, cfg.n_experts_per_token)
        self.sow(LOSSES, "added", _losses(logits, routed, here), reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(2))
        slots = T if jax.default_backend() == "cpu" else None  # whose XLA multiplies each row of a group by all kernels
        if cfg.capacity_factor is not None and not deterministic:
            slots = math.ceil(cfg.capacity_factor * cfg.n_experts_per_token * T / cfg.E)
            routed = routed._replace(expert=jnp.where(routed.rank < slots, routed.expert, cfg.E))
        kernels = {name: {"kernel": part["kernel"].astype(cfg.dtype)} for name, part in kernels.items()}
        return over_experts(functools.partial(_expert_sum, mlp=cfg.mlp, slots=slots), x, routed, kernels)

    def _init(self, key: Array) -> dict:
        cfg = self.cfg
        shapes = {"up": (cfg.F, cfg.d_model), "gate": (cfg.F, cfg.d_model), "down": (cfg.d_model, cfg.F)}
        shares = {"up": 1.0, "gate": 1.0, "down": 1 / math.sqrt(2 * cfg.n_layers)}

        def kernels(name: str, key: Array) -> Array:
            one = KERNEL_INITS[cfg.init](shares[name])
            return jax.vmap(lambda key: one(key, shapes[name]))(jax.random.split(key, cfg.E))

        names = [name for name in shapes if name != "gate" or ACTIVATIONS[cfg.mlp][1]]
        return {name: {"kernel": kernels(name, jax.random.fold_in(key, i))} for i, name in enumerate(names)}


def route(logits: Float[Array, "B T E"], here: Array, k: int) -> Routed:
    """The k likeliest experts of each token that is here, all first choices before the second ones."""
    B, T, E = logits.shape
    top, expert = jax.lax.top_k(logits, k)
    expert = jnp.where(here[..., None], expert, E)
    chosen = jax.nn.one_hot(expert.swapaxes(1, 2).reshape(B, k * T), E, dtype=jnp.int32)  # nobody's: zeros
    rank = (jnp.cumsum(chosen, axis=1) * chosen).sum(-1) - 1
    return Routed(expert, rank.reshape(B, k, T).swapaxes(1, 2), jax.nn.softmax(top))


def _losses(logits: Array, routed: Routed, here: Array) -> Float[Array, "2"]:
    E, real = logits.shape[-1], here.astype(jnp.float32)
    n = real.sum(-1)
    shares = jax.nn.one_hot(routed.expert, E).mean(2).sum(1) / jnp.maximum(n, 1)[:, None]
    probabilities = (jax.nn.softmax(logits) * real[..., None]).sum(1) / jnp.maximum(n, 1)[:, None]
    balance = (n * E * (shares * probabilities).sum(-1)).sum()
    return jnp.stack([balance, (real * jax.nn.logsumexp(logits, axis=-1) ** 2).sum()])


def _expert_sum(x: Array, routed: Routed, kernels: dict, mlp: str, slots: int | None) -> Array:
    """Σ of the experts whose kernels are here, of numbers from 0; other numbers are others'."""
    B, T, k = routed.expert.shape
    E = len(kernels["down"]["kernel"])
    expert = jnp.where((routed.expert >= 0) & (routed.expert < E), routed.expert, E)
    expert_of, rank = expert.reshape(B, T * k), routed.rank.reshape(B, T * k)
    rows, product, back = _sorted(x, expert_of, E) if slots is None else _in_slots(x, expert_of, rank, E, slots)
    activation, gated = ACTIVATIONS[mlp]
    h = product(rows, kernels["up"]["kernel"])
    h = activation(product(rows, kernels["gate"]["kernel"])) * h if gated else activation(h)
    y = back(product(h, kernels["down"]["kernel"])).reshape(B, T, k, -1)
    y = jnp.where((expert < E)[..., None], y, 0)
    return (y * routed.weight[..., None].astype(y.dtype)).sum(2)


Laid = tuple[Array, Callable[[Array, Array], Array], Callable[[Array], Array]]


def _sorted(x: Array, expert: Array, E: int) -> Laid:
    """Rows in the order of their experts, a product of groups, and rows in the order of choices again."""
    k, expert = expert.shape[1] // x.shape[1], expert.reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=E + 1)[:E].astype(jnp.int32)

    def product(rows: Array, kernel: Array) -> Array:
        return jax.lax.ragged_dot(rows, kernel.swapaxes(1, 2), sizes)

    return x.reshape(-1, x.shape[-1])[order // k], product, lambda y: y[jnp.argsort(order)]


def _in_slots(x: Array, expert: Array, rank: Array, E: int, slots: int) -> Laid:
    """Rows (E, B, slots, D), a product of each expert's, and rows in the order of choices again."""
    B, T, D = x.shape
    k = expert.shape[1] // T
    at = jnp.where(expert < E, expert * slots + rank, E * slots)
    owner = jnp.full((B, E * slots + 1), T).at[jnp.arange(B)[:, None], at].set(jnp.arange(T * k)[None] // k)[:, :-1]
    rows = jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 1), (0, 0))), owner[..., None], axis=1)  # of nobody: zeros
    rows = rows.reshape(B, E, slots, D).swapaxes(0, 1)

    def back(y: Array) -> Array:
        y = y.swapaxes(0, 1).reshape(B, E * slots, -1)
        return jnp.take_along_axis(y, jnp.minimum(at, E * slots - 1)[..., None], axis=1)

    return rows, lambda rows, kernel: jnp.einsum("ebci,eoi->ebco", rows, kernel), back
