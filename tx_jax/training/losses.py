"""Losses as (sum, count): sums add over devices and micro-batches, and are divided once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MOST = 2**26  # logits that are held at a time: 256 MiB


def cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    z_loss_rate: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted sum of −log p(target) in nats, and the sum of weights in tokens.

    Args:
        label_smoothing: ε: the target's share is 1 − ε, and ε is spread evenly over the whole vocabulary.
        z_loss_rate: of (log Σ exp logits)², which is added and keeps logits from drifting; 1e-4 in the source.

    >>> total, count = cross_entropy(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.ones((1, 2)))
    >>> f"{total / count:.4f}"  # ln 4
    '1.3863'

    Source: label smoothing: Szegedy et al. 2016, §7; Vaswani et al. 2017, §5.4. z-loss: Chowdhery et al. 2022, §5.
    """
    logits = logits.astype(jnp.float32)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    expected = (1 - label_smoothing) * gold + label_smoothing * logits.mean(axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - expected + (z_loss_rate * log_z**2 if z_loss_rate else 0.0)
    nats = jnp.where(weights != 0, nats, 0.0)  # a target of weight 0 may be any id, such as −100
    return (nats * weights).sum(), weights.sum()


def chunked_cross_entropy(
    head: Callable[[Any, Array], Array],
    params: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss_rate: float = 0.0,
    most: int = MOST,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy` of head(params, hidden), of whose (B, T, V) at most about `most` are ever held.

    Where they are more, chunks of tokens are taken in turn, and each gives its part of the gradient while its logits
    are there: nothing is computed twice. No gradient flows to weights.

    Args:
        head: (params, (B, t, D)) → logits (B, t, V), each of its row of hidden alone.
        label_smoothing, z_loss_rate: of `cross_entropy`.

    >>> hidden, table, ones = jnp.ones((1, 2, 3)), jnp.zeros((4, 3)), jnp.ones((1, 2))
    >>> loss, _ = chunked_cross_entropy(lambda w, x: x @ w.T, table, hidden, ones.astype(int), ones, vocab_size=4)
    >>> f"{loss:.4f}"  # 2 ln 4
    '2.7726'
    """

    def loss(params: Any, hidden: Array, targets: Array, weights: Array) -> Array:
        logits = head(params, hidden)
        return cross_entropy(logits, targets, weights, label_smoothing=label_smoothing, z_loss_rate=z_loss_rate)[0]

    n_chunks = min(-(-targets.size * vocab_size // most), targets.shape[1])
    if n_chunks == 1:
        return loss(params, hidden, targets, weights), weights.sum()
    return _in_chunks(loss, n_chunks, params, hidden, targets, weights), weights.sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(loss: Callable, n: int, params: Any, *rows: Array) -> Array:
    """The sum of loss(params, …) over n chunks of tokens."""
    step = lambda total, chunk: (total + loss(params, *chunk), None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros(()), _cut(n, rows))[0]


def _forward(loss: Callable, n: int, params: Any, *rows: Array) -> tuple[Array, Any]:
    def step(sums: Any, chunk: Any) -> tuple[Any, Array]:
        total, (grads, of_hidden) = jax.value_and_grad(loss, argnums=(0, 1))(params, *chunk)
        return jax.tree.map(jnp.add, sums, (total, grads)), of_hidden

    first = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (total, grads), of_hidden = jax.lax.scan(step, first, _cut(n, rows))
    B, T, D = rows[0].shape
    return total, (grads, jnp.moveaxis(of_hidden, 0, 2).reshape(B, -1, D)[:, :T])


def _backward(loss: Callable, n: int, grads: Any, scale: Array) -> tuple:
    return *jax.tree.map(lambda leaf: (leaf * scale).astype(leaf.dtype), grads), None, None


_in_chunks.defvjp(_forward, _backward)


def _cut(n: int, rows: tuple[Array, ...]) -> Any:
    """(B, T, …) as n chunks (B, T / n, …) of every n-th token: each device keeps its share of B and of T."""

    def cut(leaf: Array) -> Array:
        more = -leaf.shape[1] % n  # without weight
        leaf = jnp.pad(leaf, ((0, 0), (0, more), *((0, 0),) * (leaf.ndim - 2)))
        return jnp.moveaxis(leaf.reshape(len(leaf), -1, n, *leaf.shape[2:]), 2, 0)

    return jax.tree.map(cut, rows)
