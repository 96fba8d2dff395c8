"""softmax(q kᵀ · scale + bias) v over the pairs that a mask allows: the one attention function.

Letters: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K, H head width,
Hv width of a head's values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from tx_jax.errors import require
from tx_jax.ops.int8 import Int8
from tx_jax.ops.kernels import KERNELS, OF_BACKEND, by_kernel, why_not
from tx_jax.ops.masks import Mask
from tx_jax.ops.spread import over_mesh


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | Int8,
    v: Float[Array, "B S K Hv"] | Int8,
    mask: Mask = Mask(),
    bias: Float[Array, "#B N T S"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    impl: str = "auto",
) -> Float[Array, "B T N Hv"]:
    """For each query, the mean of the values, weighted by the softmax of its scores; zeros if it may see no key.

    Scores and softmax are float32, the result has q's dtype. N may be a multiple of K (grouped-query attention).

    Args:
        scale: what scores are multiplied by; None is 1/√H.
        soft_cap: scores become soft_cap · tanh(scores / soft_cap).
        dropout_rate: of the weights, where dropout_key is given.
        impl: a key of BODIES, or "auto": on a GPU or TPU its kernel, where that can do it. Otherwise blockwise for more
            than BLOCK queries, xla for fewer; but on a CPU for queries beside earlier keys, chunk or cached.

    >>> q = k = v = jnp.ones((1, 3, 2, 4))
    >>> attention(q, k, v, Mask(causal=True)).shape
    (1, 3, 2, 4)

    Raises:
        InputError: the shapes do not fit together, or impl is unknown, or a kernel that cannot do this.
    Source: Vaswani et al. 2017, eq. 1; grouped queries: Ainslie et al. 2023; soft cap: Gemma 2, §2.
    """
    _check_shapes(q, k, v)
    k, v = jax.tree.map(lambda leaf: leaf.transpose(0, 2, 3, 1), k), jax.tree.map(lambda leaf: leaf.swapaxes(1, 2), v)
    return laid_attention(
        q, k, v, mask, bias, scale=scale, soft_cap=soft_cap,
        dropout_rate=dropout_rate, dropout_key=dropout_key, impl=impl,
    )  # fmt: skip


def laid_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H S"] | Int8,
    v: Float[Array, "B K S Hv"] | Int8,
    mask: Mask,
    bias: Float[Array, "#B N T S"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    impl: str = "auto",
) -> Float[Array, "B T N Hv"]:
    """`attention` over keys and values laid out as its two products read them, which is how a cache holds them."""
    rate = 0.0 if dropout_key is None else dropout_rate
    wanted = OF_BACKEND.get(jax.default_backend()) if impl == "auto" else impl
    lacks = why_not(wanted, q, k, v, mask, bias, soft_cap, rate) if wanted in KERNELS else None
    if impl != "auto":
        require(impl in BODIES, f"impl={impl!r} is not one of auto, {', '.join(BODIES)}")
        require(lacks is None, f"impl={impl!r} does not do {lacks}; use auto, or blockwise")
    elif wanted and not lacks:
        impl = wanted
    else:
        cached = mask.causal and mask.k_positions is not None and q.shape[1] < k.shape[3]
        beside = cached and jax.default_backend() == "cpu"
        impl = AUTO[beside, q.shape[1] > BLOCK]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    everywhere = impl in KERNELS  # which XLA does not split among devices
    return over_mesh(BODIES[impl], everywhere, q, k, v, mask, bias, dropout_key, scale, soft_cap, rate)


AUTO = {  # by whether queries are beside earlier keys on a CPU, and whether they are many
    (False, False): "xla", (False, True): "blockwise", (True, False): "cached", (True, True): "chunk",
}  # fmt: skip


def _check_shapes(q: Array, k: Any, v: Any) -> None:
    shapes = f"q{q.shape}, k{k.shape}, v{v.shape}"
    require(len(q.shape) == len(k.shape) == len(v.shape) == 4, f"{shapes}: each must be (batch, length, heads, width)")
    require(k.shape[:3] == v.shape[:3], f"{shapes}: k and v must be alike but in width")
    require(q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3], f"{shapes}: batch and width must be equal in q, k")
    require(q.shape[2] % k.shape[2] == 0, f"{shapes}: the query heads must be a multiple of the key-value heads")


def _floats(x: Any, like: Array) -> Array:
    """Keys or values; those in 8 bits in the dtype of the queries, only when a body has taken what it needs."""
    return x.astype(like.dtype) if isinstance(x, Int8) else x


def _part(k: Any, v: Any, start: Any, n: int) -> tuple[Any, Any]:
    """Those of the n positions from `start`, which may be traced, on."""
    return tuple(jax.tree.map(lambda leaf, a=axis: _slice(leaf, start, n, a), x) for x, axis in ((k, 3), (v, 2)))


def _slice(x: Array, start: Any, n: int, axis: int) -> Array:
    """n of an axis: a slice where its start is known, whose gradient is then a pad."""
    static = isinstance(start, int)
    return (
        jax.lax.slice_in_dim(x, start, start + n, axis=axis)
        if static
        else jax.lax.dynamic_slice_in_dim(x, start, n, axis)
    )


def scores(q: Float[Array, "B T N H"], k: Float[Array, "B K H S"], scale: float) -> Float[Array, "B K G T S"]:
    """The scaled products of queries with keys, in float32."""
    (B, T, N, _), (K, _, S) = q.shape, k.shape[1:]
    return _product(_rows(q, K, scale), k).reshape(B, K, N // K, T, S)


def _rows(q: Array, K: int, scale: float) -> Array:
    """Scaled queries (B, T, N, H) as (B, K, G · T, H), those of each key-value head."""
    B, T, N, H = q.shape
    q = (q * jnp.asarray(scale, q.dtype)).reshape(B, T, K, N // K, H)
    return q.transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def _as_queries(rows: Array, T: int) -> Array:
    """Of (B, K, G · T, H) the (B, T, N, H)."""
    B, K, R, H = rows.shape
    return rows.reshape(B, K, R // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)


def _product(rows: Array, b: Array) -> Array:
    """(…, G · T, X) times (…, X, Y), summed in float32: in this order, as einsum's choice makes XLA on CPU copy b.

    XLA on CPU computes products of bfloat16 in float32 and, with the axes in another order, refuses some (jaxlib 0.10).
    """
    if jax.default_backend() == "cpu":
        rows, b = rows.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.matmul(rows, b, preferred_element_type=jnp.float32)


def _plain(q, k, v, mask, bias, key, scale, soft_cap, rate):
    """The reference: holds (B, N, T, S)."""
    B, T, N, _ = q.shape
    K, S = v.shape[1:3]
    k, v = _floats(k, q), _floats(v, q)
    found = scores(q, k, scale)
    if soft_cap is not None:
        found = soft_cap * jnp.tanh(found / soft_cap)
    if bias is not None:
        found += bias.reshape(-1, K, N // K, T, S)
    seen = mask.materialize(T, S)[:, None, None]
    least = jnp.finfo(jnp.float32).min
    found = jnp.where(seen, found, least)
    # Divided by its sum after the product with v, as in FlashAttention (Dao et al. 2022): no further pass over (T, S).
    top = jax.lax.stop_gradient(found.max(axis=-1))
    weights = jnp.exp(found - top[..., None])
    total = jnp.where(top > least, weights.sum(axis=-1), jnp.inf)  # a row that sees no key gives zeros
    if rate > 0:
        weights *= jax.random.bernoulli(key, 1 - rate, weights.shape) / (1 - rate)
    out = _product(weights.reshape(B, K, -1, S).astype(v.dtype), v) / total.reshape(B, K, -1, 1)
    return _as_queries(out, T).astype(q.dtype)


BLOCK = 64  # queries in a block: measured beside 128 and none on CPU (benchmarks/RESULTS.md)
RUNS = 8  # of blocks: the blocks of one follow one another in a loop, over as many keys as the widest of them needs


def _blockwise(q, k, v, mask, bias, key, scale, soft_cap, rate, block=None, body=_plain, runs=None):
    """A block of queries at a time, each recomputed in the backward pass: memory is linear in T.

    Keys out of a block's reach are left out. A block of its own is quicker than a loop of blocks, but XLA may have all
    of them in memory at once: up to RUNS blocks are runs of one.
    """
    (B, T, N, _), (S, Hv), block = q.shape, v.shape[2:], min(block or BLOCK, q.shape[1])
    n_whole = T // block
    size = -(-n_whole // (runs or RUNS))  # blocks in a run

    def run(first: int, n_blocks: int, n: int) -> Array:
        """The result for n_blocks blocks of n queries from the first query on."""
        starts = range(first, first + n_blocks * n, n)
        reaches = [mask.reach(start, start + n, S) for start in starts]
        width = max(stop - start for start, stop in reaches)
        keys = [min(start, S - width) for start, _ in reaches]

        def rows(q: Array, bias: Array | None, start: Any, key_start: Any) -> Array:
            seen = mask.rows(start, n, T).columns(key_start, width, S)
            part = None if bias is None else _slice(bias, key_start, width, 3)
            drawn = None if key is None else jax.random.fold_in(key, start)
            return body(q, *_part(k, v, key_start, width), seen, part, drawn, scale, soft_cap, rate)

        at = slice(first, first + n_blocks * n)
        if n_blocks == 1:
            recomputed = jax.checkpoint(functools.partial(rows, start=first, key_start=keys[0]))
            return recomputed(q[:, at], None if bias is None else bias[:, :, at])
        qs = q[:, at].reshape(B, n_blocks, n, N, -1).swapaxes(0, 1)
        biases = None if bias is None else jnp.moveaxis(bias[:, :, at].reshape(-1, N, n_blocks, n, S), 2, 0)
        fixed = keys[0] if len(set(keys)) == 1 else None
        recomputed = jax.checkpoint(
            lambda x: rows(x[0], x[1], x[2], x[3] if fixed is None else fixed), prevent_cse=False
        )
        out = jax.lax.map(recomputed, (qs, biases, jnp.array(starts), jnp.array(keys)))
        return out.swapaxes(0, 1).reshape(B, -1, N, Hv)

    parts = [(first * block, min(size, n_whole - first), block) for first in range(0, n_whole, size)]
    rest = [(n_whole * block, 1, T % block)] if T % block else []
    return jnp.concatenate([run(*part) for part in parts + rest], axis=1)


LEAST = 256  # keys that are attended in any case


def _within_reach(q, k, v, mask, bias, key, scale, soft_cap, rate):
    """The plain body over the first LEAST · 2ⁿ keys, with the least n that leaves out none that is seen.

    A cache has slots for a whole text. To attend over 4,096 of them where 256 hold a key halves the speed of decoding.
    """
    T, S = q.shape[1], k.shape[3]
    sizes = [LEAST << n for n in range(S.bit_length()) if LEAST << n < S] + [S]

    def first(n):
        part = None if bias is None else bias[..., :n]
        return lambda: _plain(q, *_part(k, v, 0, n), mask.columns(0, n, S), part, key, scale, soft_cap, rate)

    enough = (mask.n_keys(T, S) > jnp.array(sizes[:-1], jnp.int32)).sum()
    return jax.lax.switch(enough, [first(n) for n in sizes])


QUERIES, KEYS = 256, 128  # in a block: its scores, of nine heads, stay in a core's memory


def _by_keys(q, k, v, mask, bias, key, scale, soft_cap, rate):
    """A block of keys at a time, up to the last that is seen: many queries over the slots of a cache.

    The softmax is put together from its parts (Milakov & Gimelshein 2018, alg. 3), so that nothing is as long as S.
    """
    (B, T, N, _), (K, S, Hv) = q.shape, v.shape[1:]
    width, n_seen, least = min(KEYS, S), mask.n_keys(T, S), jnp.finfo(jnp.float32).min

    def add(parts, i):
        top, total, out = parts
        start = jnp.minimum(i * width, S - width)  # the last block overlaps the one before, where it is not counted
        seen = mask.columns(start, width, S).materialize(T, width) & (start + jnp.arange(width) >= i * width)

        ks, vs = (_floats(x, q) for x in _part(k, v, start, width))
        found = scores(q, ks, scale)
        if soft_cap is not None:
            found = soft_cap * jnp.tanh(found / soft_cap)
        if bias is not None:
            part = jax.lax.dynamic_slice_in_dim(bias, start, width, axis=3)
            found += part.reshape(-1, K, N // K, T, width)
        found = jnp.where(seen[:, None, None], found, least)
        highest = jnp.maximum(top, jax.lax.stop_gradient(found.max(axis=-1)))
        before = jnp.exp(top - highest)
        weights = jnp.exp(found - highest[..., None])  # 1 where nothing is seen yet, which `before` takes away later
        total = total * before + weights.sum(axis=-1)
        if rate > 0:
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, weights.shape)
            weights *= kept / (1 - rate)
        more = _product(weights.reshape(B, K, -1, width).astype(vs.dtype), vs)
        return highest, total, out * before.reshape(B, K, -1, 1) + more

    def step(parts, i):
        return jax.lax.cond(i * width < n_seen, add, lambda parts, i: parts, parts, i), None

    shape = (B, K, N // K, T)
    nothing = jnp.full(shape, least), jnp.zeros(shape), jnp.zeros((B, K, N // K * T, Hv))
    (top, total, out), _ = jax.lax.scan(step, nothing, jnp.arange(-(-S // width)))
    total = jnp.where(top > least, total, jnp.inf)  # a row that sees no key gives zeros
    return _as_queries(out / total.reshape(B, K, -1, 1), T).astype(q.dtype)


BODIES = {
    "xla": _plain,
    "blockwise": _blockwise,
    "cached": functools.partial(_blockwise, body=_within_reach),
    "chunk": functools.partial(_blockwise, body=_by_keys, block=QUERIES),
    # For a few queries over keys laid out for reading, which XLA on CPU reads at a quarter of memory's speed in a
    # product with two vectors or more, but at all of it with one (benchmarks/beam.py).
    "by_query": functools.partial(_blockwise, block=1, runs=16),  # as many as modules.attention.MOST
    **{name: functools.partial(by_kernel, name, _blockwise) for name in KERNELS},
}
