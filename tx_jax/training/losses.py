"""Losses as (sum, count): sums add over devices and micro-batches, and are divided once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted sum of −log p(target) in nats, and the sum of weights in tokens.

    Args:
        label_smoothing: ε: the target's share is 1 − ε, and ε is spread evenly over the whole vocabulary.

    >>> total, count = cross_entropy(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.ones((1, 2)))
    >>> f"{total / count:.4f}"  # ln 4
    '1.3863'

    Source: label smoothing: Szegedy et al. 2016, §7; Vaswani et al. 2017, §5.4.
    """
    logits = logits.astype(jnp.float32)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    expected = (1 - label_smoothing) * gold + label_smoothing * logits.mean(axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - expected
    nats = jnp.where(weights != 0, nats, 0.0)  # a target of weight 0 may be any id, such as −100
    return (nats * weights).sum(), weights.sum()
