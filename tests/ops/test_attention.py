"""Law 1: attention is a loop over queries in NumPy, is `jax.nn.dot_product_attention`, and every body is the same."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import InputError, Mask

B, T, H = 2, 11, 3
IMPLS = ["xla", "blockwise", "cached", "chunk", "by_query"]
POSITIONS = jnp.array([[*range(7), -1, 7, -1, -1], [-1, *range(10)]])
SEGMENTS = jnp.array([[1] * 5 + [2] * 6, [3] * 9 + [4] * 2])
RING = jnp.roll(POSITIONS, 3, axis=1)
IN_SEGMENTS = {"q_segments": SEGMENTS, "k_segments": SEGMENTS}
CASES = {  # name: (query heads, key-value heads, queries, mask, more arguments)
    "plain": (3, 3, T, Mask(), {}),
    "causal": (3, 3, T, Mask(causal=True), {}),
    "grouped": (6, 2, T, Mask(causal=True), {"bias": B}),
    "multi-query": (5, 1, T, Mask(causal=True), {"soft_cap": 0.7, "scale": 2.0, "d_value": 5}),
    "window": (3, 3, T, Mask(causal=True, window=3), {}),
    "window both ways": (3, 3, T, Mask(window=3), {}),
    "segments": (2, 2, T, Mask(causal=True, **IN_SEGMENTS), {"bias": 1, "scale": 1.0}),
    "prefix": (2, 1, T, Mask(causal=True, prefix=jnp.array([7, 0])), {}),
    "everything": (4, 2, T, Mask(causal=True, window=4, prefix=jnp.array([2, 5]), q_positions=POSITIONS,
                                 k_positions=POSITIONS, **IN_SEGMENTS), {"bias": B, "soft_cap": 1.3}),
    "cross": (4, 2, 5, Mask(k_positions=POSITIONS), {"bias": 1}),
    "late queries": (3, 1, 5, Mask(causal=True, q_positions=POSITIONS[:, 3:8], k_positions=RING), {"bias": B}),
}  # fmt: skip


def draw(name):
    """The inputs (q, k, v, bias or None) of a case, weights to sum its result with, its mask and other arguments."""
    N, K, queries, mask, more = CASES[name]
    rng, rows, Hv = np.random.default_rng(0), more.get("bias"), more.get("d_value", H)
    shapes = [(B, queries, N, H), (B, T, K, H), (B, T, K, Hv), (rows or 1, N, queries, T), (B, queries, N, Hv)]
    *qkv, bias, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    more = {key: x for key, x in more.items() if key not in ("bias", "d_value")}
    return (*qkv, bias if rows else None), weights, mask, more


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def with_gradients(f, inputs, weights):
    """f(*inputs), and the gradients of its weighted sum."""
    out, pull = jax.vjp(f, *inputs)
    return out, pull(weights)


@functools.cache
def ours(name, impl):
    inputs, weights, mask, more = draw(name)
    return with_gradients(lambda q, k, v, bias: tx.attention(q, k, v, mask, bias, impl=impl, **more), inputs, weights)


@functools.cache
def that_of_jax(name):
    inputs, weights, mask, more = draw(name)
    window = mask.window and (mask.window - 1, 0 if mask.causal else mask.window - 1)
    by_name = not jax.tree.leaves(mask)  # otherwise by the array
    rules = {"is_causal": mask.causal, "local_window_size": window} if by_name else {"mask": seen_in(name)[:, None]}
    # It gives a row that sees no key the mean of all.
    weights = weights * seen_in(name).any(-1)[..., None, None]
    return with_gradients(lambda *inputs: jax.nn.dot_product_attention(*inputs, **rules, **more), inputs, weights)


def seen_in(name):
    return np.asarray(CASES[name][3].materialize(CASES[name][2], T))


def oracle(q, k, v, bias, seen, scale=None, soft_cap=None):
    """Vaswani et al. 2017, eq. 1, one query at a time in float64, over the keys it sees."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b if len(seen) > 1 else 0, t])
        if len(keys):
            group = n // (q.shape[2] // k.shape[2])
            scores = np.array([np.dot(q[b, t, n].astype(float), k[b, s, group]) for s in keys])
            scores *= q.shape[-1] ** -0.5 if scale is None else scale
            scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
            scores = scores if bias is None else scores + bias[b if len(bias) > 1 else 0, n, t, keys]
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, keys, group] / weights.sum()
    return out


@pytest.fixture(
    params=[*((name, 4, 8) for name in IMPLS), ("cached", 1, 16), ("blockwise", 2, 2)], ids=str, scope="module"
)
def impl(request):
    """Each body, with blocks so small that there are several; a query at a time, all heads at once; runs of blocks."""
    name, block, runs = request.param
    ours.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tx_jax.ops.attention"], "BLOCK", block)
        patch.setattr(sys.modules["tx_jax.ops.attention"], "RUNS", runs)
        patch.setattr(sys.modules["tx_jax.ops.attention"], "LEAST", 3)
        patch.setattr(sys.modules["tx_jax.ops.attention"], "KEYS", 3)
        yield name


@pytest.mark.parametrize("name", CASES)
def test_a_loop_in_numpy(name, impl):
    inputs, _, _, more = draw(name)
    np.testing.assert_allclose(ours(name, impl)[0], oracle(*inputs, seen_in(name), **more), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_loop(name, impl):
    """Along one random direction of each input, by a central difference in float64."""
    inputs, weights, _, more = draw(name)
    rng, inputs = np.random.default_rng(1), [x if x is None else np.asarray(x, np.float64) for x in inputs]
    for i, gradient in enumerate(ours(name, impl)[1]):
        if gradient is not None:
            step = 1e-5 * rng.normal(size=inputs[i].shape)
            ends = [[*inputs[:i], inputs[i] + sign * step, *inputs[i + 1 :]] for sign in (1, -1)]
            high, low = ((oracle(*end, seen_in(name), **more) * np.asarray(weights)).sum() for end in ends)
            np.testing.assert_allclose((gradient * step).sum(), (high - low) / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "soft_cap" not in CASES[name][4]])
def test_the_function_of_jax(name, impl):
    (one, gradients), (other, their_gradients), rows = ours(name, impl), that_of_jax(name), seen_in(name).any(-1)
    np.testing.assert_allclose(one * rows[..., None, None], other * rows[..., None, None], rtol=0, atol=2e-6)
    for gradient, their_gradient in zip(*map(jax.tree.leaves, (gradients, their_gradients)), strict=True):
        np.testing.assert_allclose(gradient, their_gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(causal=True, window=100)], ids=str)
def test_memory_is_linear_in_what_is_read(mask):
    """That of the compiled gradient, at twice the length; without a loop it was 3.8 times as much."""

    def temporaries(n):
        q = k = jax.ShapeDtypeStruct((1, n, 4, 16), jnp.float32)
        gradient = jax.grad(lambda q, k, v: tx.attention(q, k, v, mask).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporaries(n) for n in (1024, 2048, 4096)]
    assert max(sizes[1] / sizes[0], sizes[2] / sizes[1]) <= 2.2, sizes


@pytest.mark.parametrize("name", CASES)
def test_the_first_n_keys_hold_all_that_is_seen(name):
    queries, mask = CASES[name][2:4]
    seen = np.flatnonzero(seen_in(name).any(axis=(0, 1)))
    n = int(mask.n_keys(queries, T))
    assert seen[-1] < n <= T
    if mask.window is None and mask.q_segments is None:
        assert seen[-1] == n - 1


def test_a_row_that_sees_nothing_is_zero_and_so_is_its_gradient(impl):
    inputs, _, mask, more = draw("everything")
    blind = ~seen_in("everything").any(-1)[..., None, None]
    assert blind.any()

    def attend(q, k, v, bias):
        return tx.attention(q, k, v, mask, bias, impl=impl, **more)

    out, gradients = with_gradients(attend, inputs, jnp.broadcast_to(blind, inputs[0].shape).astype(float))
    assert not np.asarray(out * blind).any()
    assert not any(np.asarray(gradient).any() for gradient in gradients)


def test_large_scores_do_not_overflow(impl):
    (*qkv, _), _, mask, _ = draw("causal")
    out = jax.jit(lambda *qkv: tx.attention(*qkv, mask, impl=impl, scale=1e4))(*qkv)
    np.testing.assert_allclose(out, oracle(*qkv, None, seen_in("causal"), scale=1e4), rtol=0, atol=1e-2)


def test_bfloat16_in_is_bfloat16_out_with_float32_between(impl):
    (*qkv, _), _, mask, _ = draw("grouped")
    rounded = [x.astype(jnp.bfloat16) for x in qkv]
    out = jax.jit(lambda *qkv: tx.attention(*qkv, mask, impl=impl, scale=0.5))(*rounded)
    assert out.dtype == jnp.bfloat16
    expected = oracle(*(np.asarray(x, np.float64) for x in rounded), None, seen_in("grouped"), scale=0.5)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=0.02)  # weights have 8 bits


def test_dropout_keeps_the_mean_and_is_a_function_of_its_key(impl):
    rate, length = 0.3, 64
    same = jnp.ones((1, length, 2, length))
    ones = jnp.broadcast_to(jnp.eye(length)[None, :, None], same.shape)  # the result is the weights themselves
    attend = jax.jit(lambda key: tx.attention(same, same, ones, dropout_rate=rate, dropout_key=key, impl=impl))
    weights, again, other = (np.asarray(attend(jax.random.key(seed))) for seed in (0, 0, 1))
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], 1 / length / (1 - rate), rtol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 0.02  # 8192 draws: 4 standard deviations
    assert len(np.unique(kept.reshape(2 * length, -1), axis=0)) == 2 * length  # no two rows share their draw
    assert (weights == again).all()
    assert (weights != other).any()
    off = tx.attention(same, same, ones, dropout_rate=rate, impl=impl)  # no key
    np.testing.assert_allclose(off, 1 / length, rtol=1e-5)


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("name", ["causal", "cross"])
def test_auto_is_one_of_them(name, block, monkeypatch):
    (q, k, v, bias), _, mask, more = draw(name)
    monkeypatch.setattr(sys.modules["tx_jax.ops.attention"], "BLOCK", block)
    np.testing.assert_allclose(tx.attention(q, k, v, mask, bias, **more), ours(name, "xla")[0], rtol=0, atol=2e-6)


ERRORS = {
    r"q\(2, 3, 4\), .*: each must be \(batch, length, heads, width\)": [(2, 3, 4), (2, 3, 1, 4), (2, 3, 1, 4)],
    r"k\(2, 3, 1, 4\), v\(2, 5, 1, 4\): k and v must be alike but in width": [(2, 3, 2, 4), (2, 3, 1, 4), (2, 5, 1, 4)],
    r"q\(1, 3, 2, 4\), k\(2, .*: batch and width must be equal in q, k": [(1, 3, 2, 4), (2, 3, 1, 4), (2, 3, 1, 4)],
    r"q\(2, 3, 3, 4\), .* query heads must be a multiple of the key-": [(2, 3, 3, 4), (2, 3, 2, 4), (2, 3, 2, 4)],
}


@pytest.mark.parametrize("text", ERRORS)
def test_refused_shapes(text):
    """As without the check of the annotations, which only tests turn on."""
    with pytest.raises(InputError, match=text):
        tx.attention.__wrapped__(*(jnp.zeros(shape) for shape in ERRORS[text]))


def test_refused_impl():
    x = jnp.zeros((1, 1, 1, 2))
    with pytest.raises(InputError, match=r"^impl='flash' is not one of auto, xla, .*, by_query, cudnn, splash$"):
        tx.attention(x, x, x, impl="flash")
