"""How order enters a Transformer: pure functions of positions, in every published form.

Absolute forms give vectors to add to embeddings, rotary gives angles to turn q and k by, relative forms give a
bias to add to scores. Frequencies, slopes and bucket borders are constants: NumPy makes them in float64 at tracing.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tx_jax.errors import require


def sinusoids(positions: Int[Array, "*b T"], d_model: int, *, interleaved: bool = True) -> Float[Array, "*b T D"]:
    """Sinusoidal position vectors: sine and cosine in turn (the paper), or all sines first (tensor2tensor).

    >>> sinusoids(jnp.array([0]), 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]

    Raises:
        InputError: d_model is odd.
    Source: Vaswani et al. 2017, §3.5.
    """
    require(d_model % 2 == 0, f"d_model={d_model} must be even: half of the columns are sines")
    angles = positions[..., None] * jnp.asarray(rotary_frequencies(d_model), jnp.float32)
    parts = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1 if interleaved else -2)
    return parts.reshape(*positions.shape, d_model)


class Rotation(NamedTuple):
    """Cosine and sine of every (position, frequency), made once and shared by all layers."""

    cos: Float[Array, "b T 1 half"]
    sin: Float[Array, "b T 1 half"]


def rotary_frequencies(d_head: int, base: float = 10_000.0) -> np.ndarray:
    """Radians per token of each of the d_head / 2 pairs. Source: Su et al. 2021 (RoFormer), §3.2.2."""
    return base ** -(np.arange(0, d_head, 2) / d_head)


def ntk_frequencies(d_head: int, base: float, factor: float) -> np.ndarray:
    """Frequencies for a context `factor` times longer: the slowest is divided by factor, the fastest stays.

    Source: "NTK-aware scaled RoPE" (bloc97, 2023): base · factor^(H / (H − 2)).
    """
    return rotary_frequencies(d_head, base * factor ** (d_head / max(d_head - 2, 1)))


def yarn_frequencies(
    d_head: int, base: float, factor: float, original_len: int, beta_fast: float, beta_slow: float
) -> np.ndarray:
    """Frequencies that turn more than beta_fast times in original_len stay, below beta_slow they are divided by factor.

    Source: Peng et al. 2023 (YaRN), §3.2, with the ramp over pair numbers of its reference code.
    """
    plain = rotary_frequencies(d_head, base)
    pair_of = [
        d_head * math.log(original_len / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (beta_fast, beta_slow)
    ]
    low, high = max(math.floor(pair_of[0]), 0), min(math.ceil(pair_of[1]), d_head - 1)
    stretched = np.clip((np.arange(d_head // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain * (1 - stretched) + plain / factor * stretched


def yarn_amplitude(factor: float) -> float:
    """What cosine and sine are multiplied by. Source: Peng et al. 2023 (YaRN), eq. 22."""
    return 0.1 * math.log(factor) + 1.0


def llama3_frequencies(
    d_head: int, base: float, factor: float, original_len: int, low_freq_factor: float, high_freq_factor: float
) -> np.ndarray:
    """Short wavelengths stay, those above original_len / low_freq_factor are divided by factor, smoothly between.

    Source: Llama 3.1's model card and reference code (`apply_scaling`).
    """
    plain = rotary_frequencies(d_head, base)
    turns = original_len * plain / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return plain * kept + plain / factor * (1 - kept)


def rotation(positions: Int[Array, "b T"], frequencies: np.ndarray, amplitude: float = 1.0) -> Rotation:
    """The Rotation of each position."""
    angles = positions[:, :, None, None] * jnp.asarray(frequencies, jnp.float32)
    return Rotation(amplitude * jnp.cos(angles), amplitude * jnp.sin(angles))


def rotate(
    x: Float[Array, "B T heads H"], turn: Rotation | None, *, interleaved: bool = False
) -> Float[Array, "B T heads H"]:
    """q or k turned by its position, in float32; x itself where there is nothing to turn by.

    Pairs are (i, i + H/2), as in Hugging Face's LLaMA; if `interleaved`, (2i, 2i + 1), as in the paper. A turn of fewer
    than H/2 angles turns the first columns of each head, and leaves the rest.

    Source: Su et al. 2021 (RoFormer), eq. 34.
    """
    if turn is None:
        return x
    n = 2 * turn.cos.shape[-1]
    pairs = x[..., :n].astype(jnp.float32).reshape(*x.shape[:-1], *((-1, 2) if interleaved else (2, -1)))
    axis = -1 if interleaved else -2
    a, b = pairs.take(0, axis), pairs.take(1, axis)
    turned = jnp.stack([a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin], axis=axis)
    turned = turned.reshape(*x.shape[:-1], n).astype(x.dtype)
    return turned if n == x.shape[-1] else jnp.concatenate([turned, x[..., n:]], axis=-1)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """One slope per head, a geometric sequence from 2^(−8/n). Source: Press et al. 2021 (ALiBi), §3 and its code."""
    near = 2 ** math.floor(math.log2(n_heads))  # for other counts, every second slope of the next power fills up
    slopes = 2.0 ** (-8.0 / near * np.arange(1, near + 1))
    extra = 2.0 ** (-4.0 / near * np.arange(1, 2 * (n_heads - near), 2))
    return np.concatenate([slopes, extra])


def alibi_bias(q_positions: Int[Array, "b T"], k_positions: Int[Array, "b S"], n_heads: int) -> Float[Array, "b N T S"]:
    """−slope · distance, to be added to scores. Source: Press et al. 2021 (ALiBi), §3."""
    distance = jnp.abs(q_positions[:, None, :, None] - k_positions[:, None, None, :])
    return -jnp.asarray(alibi_slopes(n_heads), jnp.float32)[:, None, None] * distance


def t5_buckets(
    q_positions: Int[Array, "b T"],
    k_positions: Int[Array, "b S"],
    *,
    n_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> Int[Array, "b T S"]:
    """The bucket of each relative position: near ones have their own, far ones share by the logarithm of distance.

    Borders are whole numbers found ahead, so that every backend agrees (a float32 logarithm would round on a TPU).

    Source: Raffel et al. 2020 (T5), §2.1, and its code (`_relative_position_bucket`).
    """
    ahead = k_positions[:, None, :] - q_positions[:, :, None]
    n_side = n_buckets // 2 if bidirectional else n_buckets
    exact = n_side // 2
    steps = np.arange(1, n_side - exact) / (n_side - exact)
    borders = np.ceil(exact * (max_distance / exact) ** steps - 1e-6)  # 1e-6: a whole border stays whole
    distance = jnp.abs(ahead) if bidirectional else jnp.maximum(-ahead, 0)
    far = exact + jnp.searchsorted(jnp.asarray(borders, jnp.int32), distance, side="right")
    bucket = jnp.where(distance < exact, distance, far)
    return bucket + n_side * (ahead > 0) if bidirectional else bucket
