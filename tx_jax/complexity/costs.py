"""What a model costs, component by component, from its configuration alone: nothing is allocated and nothing is run.

A parameter's own shape says what it costs: a kernel two FLOPs for each of its numbers and tokens, and its bytes once a
pass. Only what has no parameters, scores and sums, is written out here. Conventions are XLA's, by which a test holds it
(2 FLOPs a multiply-add, one each other operation, none for exp and its like).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tx_jax.cache import init_cache
from tx_jax.complexity.activations import kept_bytes
from tx_jax.complexity.leaves import Leaf, leaves, windows
from tx_jax.config import ModelConfig
from tx_jax.data.batches import Batch, PairBatch
from tx_jax.errors import require
from tx_jax.models import build, init_params
from tx_jax.training.peaks import Device
from tx_jax.training.step import make_eval_step

BACKWARD = 2  # FLOPs and bytes for one of the forward pass: each product has two gradients
SOFTMAX = 5  # of a score: mask, greatest, difference, exp (none), sum, and its part in the product
NORMS = {"layernorm": 6, "rmsnorm": 4, "rmsnorm_offset": 5}  # of a number: mean, difference, square, mean, ×, ×
ACTIVATION = {"relu": 1, "gelu": 4, "gelu_tanh": 8, "silu": 1, "swiglu": 2, "geglu": 5, "geglu_tanh": 9}  # tanh: none
ROTATION = 3  # of a number that is turned: × cos, × sin, +


class Work(NamedTuple):
    """What a device has to do."""

    flops: int = 0  # floating-point operations; a multiply-add is two
    n_bytes: int = 0  # to and from memory, if what is between two products stays near

    @property
    def intensity(self) -> float:
        """FLOPs for each byte: below a device's own, memory is what it waits for."""
        return self.flops / self.n_bytes if self.n_bytes else 0.0

    def seconds(self, device: Device) -> float:
        """The least time that a device needs: of computing or of memory, whichever is longer (Williams et al. 2009)."""
        return max(self.flops / device.flops, self.n_bytes / device.bandwidth)


Parts = dict[str, Work]


def total(parts: Parts) -> Work:
    """The sum over components."""
    return Work(*(sum(column) for column in zip(*parts.values(), strict=True)))


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What a model costs: FLOPs and bytes by component. `python -m tx_jax.complexity` prints them as a table.

    >>> complexity(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1), batch=1, seq_len=10).cache_bytes
    680
    """

    cfg: ModelConfig
    batch: int  # rows
    seq_len: int  # tokens a row; of the target
    source_len: int  # tokens a row of the source; 0: there is none
    params: dict[str, int]  # how many numbers, by component
    forward: Parts  # of all rows, by component
    backward: Parts  # the same, of the gradients that follow a forward pass
    decode: Parts | None  # of one more token a row after seq_len, with the cache; None: an encoder decodes nothing
    decode_again: Parts | None  # the same without it: all of the row is computed again
    cache_bytes: int  # of seq_len slots a row, or a window's, where all layers have one
    memory_bytes: int  # of the source's keys and values, which a decoder keeps beside its cache; 0: there is no source

    def activation_bytes(self, remat: str = "none") -> dict[str, int]:
        """What the backward pass of a training step is given by the forward pass, beside parameters and the batch.

        By component, without dropout, of weights in cfg.dtype. It is asked of JAX's differentiation, of the attention
        that this backend has. XLA may compute some of it again.

        Args:
            remat: as `build` has it.
        """
        model, (batch, params) = build(self.cfg, remat), _shapes(self.cfg, self.batch, self.seq_len, self.source_len)
        found = kept_bytes(lambda params, batch: make_eval_step(model)(params, batch)[0], params, batch)
        return {name: found[name] for name in self.params}


def complexity(
    cfg: ModelConfig, batch: int = 1, seq_len: int | None = None, source_len: int | None = None
) -> Complexity:
    """What a model costs for `batch` rows of `seq_len` tokens, in cfg.dtype.

    Attention is of whole rows though it be causal, of a window's width where there is one. Of experts those count that
    a token is sent to, though on a CPU, without a capacity, all read it. Bytes are those of weights
    and of what products read and write; scores are counted as if they stayed near the processor, as in a flash kernel.

    Args:
        seq_len: None: cfg.max_len.
        source_len: of an encoder-decoder; None: seq_len.

    >>> found = complexity(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1, d_mlp=16, mlp="relu"), 1, 10)
    >>> found.forward["head"].flops == 10 * 2 * 7 * 8, found.params["feed-forward"]
    (True, 256)

    Raises:
        InputError: a number is below 1, seq_len exceeds cfg.max_len, there is no vocabulary yet, or source_len is of a
            model without a source.
    """
    T, both = cfg.max_len if seq_len is None else seq_len, cfg.stack == "encoder_decoder"
    S = 0 if not both else T if source_len is None else source_len
    require(batch >= 1 and T >= 1, f"batch={batch}, seq_len={T} must be at least 1")
    require(cfg.max_len >= T, f"seq_len={T} exceeds max_len={cfg.max_len}; shorten it, or replace max_len in the cfg")
    require(S >= 1 or not both, f"source_len={S} must be at least 1; None is seq_len")
    require(both or source_len is None, f"source_len={source_len} needs stack='encoder_decoder', not {cfg.stack!r}")
    found = leaves(cfg)
    forward = _parts(cfg, found, batch, Pass(T, T, T, S, S))
    decodes = cfg.stack != "encoder"
    decode = _parts(cfg, found, batch, Pass(1, T, 1, 0, S)) if decodes else None
    again = _parts(cfg, found, batch, Pass(T, T, 1, 0, S)) if decodes else None
    backward = {name: Work(*(BACKWARD * n for n in work)) for name, work in forward.items()}
    params = {name: sum(leaf.n_params for leaf in found if leaf.component == name) for name in forward}
    slots = min(T, cfg.reach or T)
    cache = n_bytes(jax.eval_shape(lambda: init_cache(cfg, batch, slots))) if decodes else 0
    return Complexity(cfg, batch, T, S, params, forward, backward, decode, again, cache, _memory(cfg, batch, T, S))


def n_bytes(tree: Any) -> int:
    """Of all leaves of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Pass(NamedTuple):
    """What one row goes through."""

    queries: int  # tokens that are computed
    keys: int  # tokens that they see
    logits: int  # tokens whose logits are asked for
    source: int = 0  # tokens that are encoded
    source_keys: int = 0  # tokens of the source that are seen


def _parts(cfg: ModelConfig, found: list[Leaf], B: int, row: Pass) -> Parts:
    """The work of B rows."""
    size, parts = jnp.dtype(cfg.dtype).itemsize, dict.fromkeys(_names(cfg), Work())

    def add(name: str, flops: int, numbers: int = 0) -> None:
        before = parts[name]
        parts[name] = Work(before.flops + flops, before.n_bytes + numbers * size)

    def attend(name: str, queries: int, keys: int) -> None:
        width = cfg.H + cfg.Hv
        flops = B * queries * keys * cfg.n_heads * (2 * width + SOFTMAX)
        add(name, flops, B * (queries * cfg.n_heads + keys * cfg.K) * width)

    def block(queries: int, keys: int) -> None:
        """What of a block has no parameters, cross-attention apart."""
        n, experts = B * queries, cfg.n_experts_per_token if cfg.n_experts else 1
        turned = int(cfg.H * cfg.rotary.fraction) * cfg.positions.startswith("rotary")
        attend("attention scores", queries, keys)
        add("attention projections", n * ROTATION * turned * (cfg.n_heads + cfg.K))
        add("feed-forward", n * ACTIVATION[cfg.mlp] * cfg.F * experts)
        add("norms", n * 2 * cfg.d_model)  # the sums of the residual stream

    for leaf in found:
        n = row.source if leaf.of_source else row.logits if leaf.component == "head" else row.queries
        add(leaf.component, *_of_leaf(cfg, leaf, B * n * leaf.times))
    for keys in windows(cfg, row.keys):
        block(row.queries, keys)
        if row.source_keys:
            attend("cross-attention scores", row.queries, row.source_keys)
            add("norms", B * row.queries * cfg.d_model)
    for _ in range((cfg.n_encoder_layers or cfg.n_layers) if row.source else 0):
        block(row.source, row.source)
    return parts


def _names(cfg: ModelConfig) -> list[str]:
    cross = ["cross-attention projections", "cross-attention scores"] if cfg.stack == "encoder_decoder" else []
    return ["embedding", "attention projections", "attention scores", *cross, "feed-forward", "norms", "head"]


def _of_leaf(cfg: ModelConfig, leaf: Leaf, n: int) -> tuple[int, int]:
    """FLOPs, and numbers that are moved, of a parameter that is met n times."""
    width, size = leaf.shape[-1], math.prod(leaf.shape)
    if leaf.name == "kernel":
        return 2 * leaf.matrix * n, min(size, leaf.matrix * n) + sum(leaf.shape[-2:]) * n
    if leaf.component == "embedding":
        return width * n, 2 * width * n
    if leaf.component == "norms":
        each = {"bias": 1}.get(leaf.name, NORMS[cfg.norm])
        return each * width * n, size + 2 * width * n * (leaf.name != "bias")
    return width * n, size  # a bias


def _shapes(cfg: ModelConfig, B: int, T: int, S: int) -> tuple[Batch | PairBatch, dict]:
    """Of a batch, and of parameters in cfg.dtype."""

    def batch() -> Batch | PairBatch:
        ids, source = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
        rows = ids, ids, jnp.ones((B, T))
        return PairBatch(source, *rows) if S else Batch(*rows)

    params = jax.eval_shape(lambda key: init_params(build(cfg), key), jax.random.key(0))
    return jax.eval_shape(batch), jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, cfg.dtype), params)


def _memory(cfg: ModelConfig, B: int, T: int, S: int) -> int:
    """Bytes of what `encode` gives."""
    batch, params = _shapes(cfg, B, T, S)

    def encode(params: dict, source: Any) -> Any:
        return build(cfg).apply({"params": params}, source, method="encode")

    return n_bytes(jax.eval_shape(encode, params, batch.source)) if isinstance(batch, PairBatch) else 0
