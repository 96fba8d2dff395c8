"""Attention by the kernels of accelerators: cuDNN's on NVIDIA GPUs, splash attention of Pallas on TPUs.

A kernel knows the order of tokens by their index, and `Mask` by their positions. Where it is given some, `Padded` says
what the kernel needs, and whether the two orders are one: only then is it right, which is known as the program runs.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tx_jax.ops.int8 import Int8
from tx_jax.ops.masks import Mask
from tx_jax.ops.spread import n_sequence_parts


class Padded(NamedTuple):
    """The tokens of queries and keys, as kernels are told of them."""

    q: Int[Array, "#B T"]  # segment of each query, −1: it sees nothing
    k: Int[Array, "#B S"]  # segment of each key, −1: there is none
    n_keys: Int[Array, "#B"]  # keys before the padding
    fits: Bool[Array, ""]  # whether the kernel may be asked


def padded(mask: Mask, T: int, S: int) -> Padded | None:
    """What the positions and segments of a mask come to; None: it has neither, and all are in order."""
    if mask.q_positions is mask.k_positions is mask.q_segments is mask.k_segments is None:
        return None
    q_at = jnp.arange(T)[None] if mask.q_positions is None else mask.q_positions
    k_at = jnp.arange(S)[None] if mask.k_positions is None else mask.k_positions
    q_in, k_in, packed = jnp.zeros_like(q_at), jnp.zeros_like(k_at), False
    if mask.q_segments is not None and mask.k_segments is not None:
        q_in, k_in, packed = mask.q_segments, mask.k_segments, True
    real, next_real = k_at[:, :-1] >= 0, k_at[:, 1:] >= 0
    n_keys, keys = (k_at >= 0).sum(1), jnp.where(k_at >= 0, k_in, -1)
    fits = (real | ~next_real).all() & (k_in >= 0).all()  # no token after padding
    fits &= jnp.bool(mask.causal) | ((k_at >= 0).all() if packed or mask.window else (n_keys > 0).all())
    if mask.causal or mask.window or packed:
        same = (k_in[:, :-1] == k_in[:, 1:]) & (k_at[:, 1:] - k_at[:, :-1] == 1)
        fits &= (same | (k_in[:, :-1] < k_in[:, 1:]) | ~next_real).all() & (q_at == k_at).all() & (q_in == k_in).all()
    return Padded(keys if mask.causal else q_in, keys, n_keys, fits)


def cudnn(q: Array, k: Array, v: Array, mask: Mask, told: Padded | None, scale: float, soft_cap: None) -> Array:
    """The flash attention of cuDNN. Source: Dao 2023, by `jax.nn.dot_product_attention`."""
    window = None if mask.window is None else (mask.window - 1, 0)
    lengths = None if told is None else jnp.broadcast_to(jnp.maximum(told.n_keys, 1), q.shape[:1]).astype(jnp.int32)
    return jax.nn.dot_product_attention(
        q, k.transpose(0, 3, 1, 2), v.swapaxes(1, 2), scale=scale, is_causal=mask.causal, local_window_size=window,
        key_value_seq_lengths=lengths, implementation="cudnn",
    )  # fmt: skip


LANES = 128  # of a TPU: lengths and widths of heads are multiples
SPLASH_BLOCK = 512  # queries and keys, at most: what MaxText trains with


def splash(q: Array, k: Array, v: Array, mask: Mask, told: Padded | None, scale: float, soft_cap: float | None):
    """Splash attention, which passes over blocks that nothing is seen in. Elsewhere than on a TPU it is interpreted."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # here, because it takes a second

    (B, T, N, _), (S, Hv) = q.shape, v.shape[2:]
    back = None if mask.window is None else mask.window - 1
    rule: Any = pallas.FullMask((T, S))
    if mask.causal or back is not None:
        rule = pallas.LocalMask((T, S), (back, 0 if mask.causal else back), offset=0)
    n_q, n_k = math.gcd(T, SPLASH_BLOCK), math.gcd(S, SPLASH_BLOCK)
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([rule] * N), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=soft_cap,
        block_sizes=pallas.BlockSizes(n_q, n_k, n_k, n_q, n_k, n_k, n_q, n_k),
        interpret=jax.default_backend() != "tpu",
    )  # fmt: skip
    heads: Any = (q * jnp.asarray(scale, q.dtype)).swapaxes(1, 2), k.swapaxes(2, 3), v
    heads = [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % LANES))) for x in heads]
    ids = None if told is None else pallas.SegmentIds(
        *(jnp.broadcast_to(x, (B, x.shape[1])).astype(jnp.int32) for x in (told.q, told.k))
    )  # fmt: skip
    out: Any = jax.vmap(kernel)(*heads, ids)
    return out[..., :Hv].swapaxes(1, 2).astype(q.dtype)


def why_not(name: str, q: Array, k: Any, v: Any, mask: Mask, bias: Any, soft_cap: float | None, rate: float):
    """What of this the kernel does not do, in words; None: it can be asked."""
    ((T, _, H), (S, Hv)), ordered = (q.shape[1:], v.shape[2:]), mask.causal or mask.window is not None
    packed = mask.q_segments is not None
    neither = {
        "keys in 8 bits": isinstance(k, Int8) or isinstance(v, Int8),
        "a bias": bias is not None,
        "dropout": rate > 0,
        "a prefix": mask.prefix is not None,
        "sinks": mask.n_sinks > 0,
        "queries beside earlier keys": T != S and (ordered or packed),
        "a sequence that the mesh splits": n_sequence_parts() > 1,
    }
    own = {
        "cudnn": {
            "anything on this device, which is no NVIDIA GPU since Ampere,": not has_cudnn(),
            f"queries of {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16),
            f"heads of {H}, which is no multiple of 8 up to 128,": H % 8 > 0 or H > 128,
            "values of another width": Hv != H,
            "a soft cap": soft_cap is not None,
            "a window both ways": mask.window is not None and not mask.causal,
            "segments": packed,
        },
        "splash": {f"lengths of {T} and {S}, which are no multiples of {LANES},": T % LANES > 0 or S % LANES > 0},
    }
    return next((reason for reason, holds in (neither | own[name]).items() if holds), None)


def has_cudnn() -> bool:
    """Whether the devices are NVIDIA GPUs that cuDNN's flash attention is made for."""
    device = jax.devices()[0]
    cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return cuda and float(device.compute_capability) >= 8.0


KERNELS = {"cudnn": cudnn, "splash": splash}
OF_BACKEND = {"gpu": "cudnn", "tpu": "splash"}


def by_kernel(name: str, otherwise: Callable, q, k, v, mask, bias, key, scale, soft_cap, rate) -> Array:
    """A body of `attention`: the kernel or, where positions are in another order than tokens, `otherwise`."""
    told = padded(mask, q.shape[1], v.shape[2])
    run = KERNELS[name]
    if told is None:
        return run(q, k, v, mask, None, scale, soft_cap)

    def by_index() -> Array:
        out = run(q, k, v, mask, told, scale, soft_cap)
        seen = told.q >= 0  # a query that sees no key gives zeros
        return jnp.where(seen[..., None, None], out, 0)

    return jax.lax.cond(
        told.fits, by_index, lambda: otherwise(q, k, v, mask, bias, key, scale, soft_cap, rate).astype(q.dtype)
    )
