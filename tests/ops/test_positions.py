"""Every way in which order enters, against its published formula, written here once more and in loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_jax import InputError, RotaryConfig
from tx_jax.modules.positions import FREQUENCIES, rotation
from tx_jax.ops import positions as ops

POSITIONS = np.array([[0, 1, 2, 5, 13, 89, 233, 1000]], np.int32)


@pytest.mark.parametrize("interleaved", [True, False])
def test_sinusoids_are_those_of_the_paper(interleaved):
    """Vaswani et al. 2017, §3.5: PE(pos, 2i) = sin(pos / 10000^(2i / d)), PE(pos, 2i + 1) = cos(the same)."""
    d = 14
    expected = np.zeros((*POSITIONS.shape, d))
    for (b, t), position in np.ndenumerate(POSITIONS):
        for i in range(d // 2):
            columns = (2 * i, 2 * i + 1) if interleaved else (i, i + d // 2)
            angle = position / 10000 ** (2 * i / d)
            expected[b, t, columns[0]], expected[b, t, columns[1]] = math.sin(angle), math.cos(angle)
    got = ops.sinusoids(jnp.asarray(POSITIONS), d, interleaved=interleaved)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)  # float32 angles up to 1000


def test_sinusoids_refuse_an_odd_width():
    with pytest.raises(InputError, match=r"^d_model=5 must be even: half of the columns are sines$"):
        ops.sinusoids(jnp.zeros((1, 1), int), 5)


def turned(x, positions, interleaved=False, cfg=RotaryConfig()):
    turn = rotation(jnp.asarray(positions, jnp.int32).reshape(1, -1), cfg, x.shape[-1])
    return np.asarray(ops.rotate(jnp.asarray(x, jnp.float32), turn, interleaved=interleaved))


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape)


def test_a_rotation_is_a_complex_product():
    """Su et al. 2021, eq. 34: pair i of position p is multiplied by exp(i p θᵢ)."""
    x, frequencies = draw(1, 8, 2, 6), 10000.0 ** -(np.arange(3) / 3)
    factor = np.exp(1j * POSITIONS[0][:, None, None] * frequencies)
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * factor
    expected = np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(turned(x, POSITIONS, interleaved=True), expected, rtol=0, atol=2e-4)
    halves = [*range(0, 6, 2), *range(1, 6, 2)]  # the other layout is the same up to where a pair's parts lie
    np.testing.assert_allclose(turned(x[..., halves], POSITIONS), expected[..., halves], rtol=0, atol=2e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200), st.booleans())
def test_rotated_scores_depend_on_distance_only_and_norms_on_nothing(p, q, shift, interleaved):
    x, y = draw(1, 1, 1, 8), draw(1, 1, 1, 8)[..., ::-1]
    score, moved = (
        (turned(x, [p + by], interleaved) * turned(y, [q + by], interleaved)).sum() for by in (0, shift)
    )  # fmt: skip
    assert abs(score - moved) < 1e-3
    np.testing.assert_allclose(np.linalg.norm(turned(x, [p], interleaved)), np.linalg.norm(x), rtol=1e-5)


def test_nothing_to_turn_by_gives_x_and_dtype_is_kept():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    assert ops.rotate(x, None) is x
    assert ops.rotate(x, rotation(jnp.array([[3]]), RotaryConfig(), 4)).dtype == jnp.bfloat16


def plain_frequencies(d, base):
    return [1.0 / base ** (2 * i / d) for i in range(d // 2)]


def yarn(d, cfg):
    """Peng et al. 2023, §3.2, as its code has it: pairs below `low` stay, above `high` are divided, linear between."""

    def pair_that_turns(times):
        return d * math.log(cfg.original_len / (times * 2 * math.pi)) / (2 * math.log(cfg.base))

    low = max(math.floor(pair_that_turns(cfg.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(cfg.beta_slow)), d - 1)
    high += 0.001 if low == high else 0
    for i, plain in enumerate(plain_frequencies(d, cfg.base)):
        stays = 1 - min(max((i - low) / (high - low), 0), 1)
        yield plain / cfg.factor * (1 - stays) + plain * stays


def llama3(d, cfg):
    """`apply_scaling` of Llama 3.1, frequency by frequency."""
    for plain in plain_frequencies(d, cfg.base):
        wavelength = 2 * math.pi / plain
        if wavelength < cfg.original_len / cfg.high_freq_factor:
            yield plain
        elif wavelength > cfg.original_len / cfg.low_freq_factor:
            yield plain / cfg.factor
        else:
            smooth = (cfg.original_len / wavelength - cfg.low_freq_factor) / (
                cfg.high_freq_factor - cfg.low_freq_factor
            )
            yield (1 - smooth) * plain / cfg.factor + smooth * plain


PUBLISHED = {
    "none": lambda d, cfg: plain_frequencies(d, cfg.base),
    "linear": lambda d, cfg: [plain / cfg.factor for plain in plain_frequencies(d, cfg.base)],  # Chen et al. 2023
    "ntk": lambda d, cfg: plain_frequencies(d, cfg.base * cfg.factor ** (d / (d - 2))),  # bloc97, 2023
    "yarn": yarn,
    "llama3": llama3,
}
ROTARY = [
    {"factor": 8.0, "base": 500_000.0},  # Llama 3.1
    {"factor": 32.0, "base": 500_000.0},  # Llama 3.2
    {"factor": 40.0, "original_len": 4096},  # DeepSeek-V2
    {"factor": 4.0, "original_len": 32_768, "base": 1e6},  # Qwen 2.5
    {
        "factor": 2.0,
        "original_len": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "beta_fast": 3.0,
        "beta_slow": 2.9,
    },
]


@pytest.mark.parametrize("d_head", [4, 64, 128])
@pytest.mark.parametrize("numbers", ROTARY, ids=str)
@pytest.mark.parametrize("scaling", PUBLISHED)
def test_frequencies(scaling, numbers, d_head):
    cfg = RotaryConfig(scaling=scaling, **numbers)
    np.testing.assert_allclose(FREQUENCIES[scaling](cfg, d_head), list(PUBLISHED[scaling](d_head, cfg)), rtol=1e-12)


@pytest.mark.parametrize("scaling", PUBLISHED)
def test_only_yarn_changes_the_length_of_vectors(scaling):
    """Peng et al. 2023, eq. 22: both q and k by 0.1 ln s + 1; for s = 16, transformers has 1.277258872223978."""
    x = draw(1, 1, 1, 8)
    by = np.linalg.norm(turned(x, [7], cfg=RotaryConfig(scaling=scaling, factor=16.0))) / np.linalg.norm(x)
    np.testing.assert_allclose(by, 1.277258872223978 if scaling == "yarn" else 1, rtol=1e-6)


SLOPES = {  # of Press et al. 2021: §3 for 8 and 16 heads; `get_slopes` of its code for 12 and 6
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
    16: [2 ** -(i / 2) for i in range(1, 17)],
    12: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
    1: [1 / 256],
}


@pytest.mark.parametrize("n_heads", SLOPES)
def test_alibi(n_heads):
    np.testing.assert_allclose(ops.alibi_slopes(n_heads), SLOPES[n_heads], rtol=1e-12)
    q, k = np.array([[4, 9]]), np.array([[0, 4, 7]])
    got = ops.alibi_bias(jnp.asarray(q), jnp.asarray(k), n_heads)
    for (_, n, t, s), bias in np.ndenumerate(got):
        np.testing.assert_allclose(bias, -SLOPES[n_heads][n] * abs(q[0, t] - k[0, s]), rtol=1e-6)


def t5_bucket(ahead, bidirectional, n_buckets, max_distance):
    """`_relative_position_bucket` of the T5 code, for one distance in float64."""
    bucket = 0
    if bidirectional:
        n_buckets //= 2
        bucket, distance = (n_buckets if ahead > 0 else 0), abs(ahead)
    else:
        distance = max(-ahead, 0)
    exact = n_buckets // 2
    if distance < exact:
        return bucket + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return bucket + min(exact + int(share * (n_buckets - exact) + 1e-9), n_buckets - 1)  # 1e-9: log 8 / log 2 is 3


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (64, 256), (4, 3)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets(bidirectional, n_buckets, max_distance):
    sizes = {"bidirectional": bidirectional, "n_buckets": n_buckets, "max_distance": max_distance}
    distances = np.arange(-300, 301)
    got = jax.jit(lambda k: ops.t5_buckets(jnp.array([[300]]), k, **sizes))(jnp.asarray(distances + 300)[None])
    assert got[0, 0].tolist() == [t5_bucket(int(ahead), **sizes) for ahead in distances]


def test_t5_buckets_of_known_distances():
    """Values that `_relative_position_bucket` gives with its defaults of 32 buckets to distance 128."""
    for bidirectional, known in {
        True: {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -64: 14, -91: 15, -999: 15, 1: 17, 8: 24, 999: 31},
        False: {5: 0, 0: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -32: 21, -64: 26, -113: 31, -999: 31},
    }.items():
        k = jnp.asarray([[1000 + ahead for ahead in known]])
        got = ops.t5_buckets(jnp.array([[1000]]), k, bidirectional=bidirectional)
        assert got[0, 0].tolist() == list(known.values())
