"""From logits to a token: pure functions, and one value that says which of them apply.

A `Sampler` is a pytree: which rules are there is static, their numbers are leaves. Changing a number compiles nothing.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tx_jax.errors import require

Number = float | int | Float[Array, ""] | Int[Array, ""]


class Sampler(NamedTuple):
    """How a token is drawn; None leaves a rule out, and Sampler() is greedy. Rules apply in this order.

    >>> Sampler(temperature=0.8, top_k=40)
    Sampler(temperature=0.8, top_k=40, top_p=None, min_p=None)
    """

    temperature: Number | None = None  # logits are divided by it; None: the likeliest token
    top_k: Number | None = None  # keep the k likeliest
    top_p: Number | None = None  # keep the likeliest whose probabilities first reach p (Holtzman et al. 2020)
    min_p: Number | None = None  # keep those at least p times as likely as the likeliest (Nguyen et al. 2024)


BOUNDS = {  # of each number: (test, rule)
    "temperature": (lambda x: x > 0, "positive; leave it out (None) for greedy"),
    "top_k": (lambda x: x >= 1, "at least 1; leave it out (None) to keep all"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1]; leave it out (None) to keep all"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]; leave it out (None) to keep all"),
}


def check_sampler(sampler: Sampler) -> None:
    """Hold every number of `sampler` to its bounds; traced ones cannot be seen.

    Raises:
        InputError: a number is out of its bounds.
    """
    for name, (test, rule) in BOUNDS.items():
        value = getattr(sampler, name)
        if value is not None and not isinstance(value, Tracer):
            require(np.ndim(value) == 0, f"{name}={value} must be one number, for all rows")
            require(test(value), f"{name}={value} must be {rule}")


def keep_top_k(logits: Float[Array, "B V"], k: Number) -> Float[Array, "B V"]:
    """Logits, −inf below the k-th largest of the row. Ties with it stay."""
    largest_first = -jnp.sort(-logits, axis=-1)
    last = jnp.clip(jnp.asarray(k), 1, logits.shape[-1]) - 1
    return jnp.where(logits < largest_first.take(last, axis=-1)[..., None], -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], p: Number) -> Float[Array, "B V"]:
    """Logits, −inf outside the smallest set whose probability reaches p. The likeliest and ties with the last stay."""
    largest_first = -jnp.sort(-logits, axis=-1)
    mass = jax.nn.softmax(largest_first, axis=-1)
    kept = jnp.cumsum(mass, axis=-1) - mass < p  # the mass before a token
    least = jnp.where(kept, largest_first, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where((logits < least) & (p < 1), -jnp.inf, logits)  # p = 1 keeps all, whatever the rounding


def keep_min_p(logits: Float[Array, "B V"], p: Number) -> Float[Array, "B V"]:
    """Logits, −inf where the probability is below p times the largest."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


RULES = {
    "temperature": lambda logits, t: logits / t,
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
}


def sample(logits: Float[Array, "B V"], sampler: Sampler, key: PRNGKeyArray | None = None) -> Int[Array, " B"]:
    """One token a row: the likeliest if sampler.temperature is None, otherwise drawn with `key`.

    >>> sample(jnp.array([[0.0, 2.0, 1.0]]), Sampler()).tolist()
    [1]
    """
    if sampler.temperature is None:
        return logits.argmax(axis=-1).astype(jnp.int32)
    for name, rule in RULES.items():
        value = getattr(sampler, name)
        logits = logits if value is None else rule(logits, value)
    return jax.random.categorical(cast(Array, key), logits).astype(jnp.int32)
