"""Law 13: a step is one function, however many devices share it, and however they do."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import Batch, MeshConfig, ModelConfig, OptimConfig
from tx_jax.data.batches import PairBatch
from tx_jax.ops.attention import attention
from tx_jax.ops.masks import Mask
from tx_jax.parallel import AXIS, check_batch, check_mesh

V, B, T = 16, 8, 12
GPT = ModelConfig(vocab_size=V, d_model=16, n_heads=4, n_layers=1, max_len=T, positions="learned", biases="all")
LLAMA = dataclasses.replace(
    GPT, n_kv_heads=2, positions="rotary", norm="rmsnorm", mlp="swiglu", biases="none", tie_head=False
)
MODELS = {
    "GPT": GPT,
    "LLaMA": LLAMA,
    "experts": dataclasses.replace(LLAMA, n_experts=4),
    "experts of some capacity": dataclasses.replace(LLAMA, n_experts=4, capacity_factor=0.9),
    "encoder-decoder": dataclasses.replace(GPT, stack="encoder_decoder", n_encoder_layers=1),
}
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(fsdp=8),
    "data 2 × tensor 4": MeshConfig(data=2, tensor=4),
    "data 2 × expert 4": MeshConfig(data=2, expert=4),
    "fsdp 2 × sequence 2 × tensor 2": MeshConfig(fsdp=2, sequence=2, tensor=2),
}
# With an ε this large an update is nearly linear in the gradient; otherwise rounding decides the sign of small ones.
ADAMW = OptimConfig(schedule="constant", warmup_steps=0, peak_lr=0.01, eps=1e-2)


def make_batch(cfg, seed):
    """Rows of very unequal length: some devices have nothing to learn."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(V, size=(B, T + 1)).astype(np.int32)
    real = np.arange(T) < np.array((0, 1, 12, 2, 0, 11, 3, 5))[:, None]
    positions = np.where(real, np.arange(T), -1).astype(np.int32)
    batch = tokens[:, :-1], tokens[:, 1:], real.astype(np.float32)
    if cfg.stack == "encoder_decoder":
        return PairBatch(rng.integers(V, size=(B, T)).astype(np.int32), *batch, positions[::-1], positions)
    return Batch(*batch, positions)


@functools.cache
def updated(model, how="one device"):
    """The placed state and metrics after 3 steps."""
    cfg = MODELS[model]
    built, optimizer = tx.build(cfg), tx.make_optimizer(ADAMW, n_steps=100)
    more = {"pmap": {"axis_name": AXIS}, "accumulation": {"accumulate_steps": 8}}.get(how.split()[0], {})
    more |= {"label_smoothing": 0.1, "ema_rate": 0.2, "balance_rate": 0.1, "router_z_rate": 0.1}
    step = tx.make_train_step(built, optimizer, **more)
    begin = functools.partial(tx.init_state, built, optimizer, ema=True)
    shapes = jax.eval_shape(begin, jax.random.key(0))
    mesh = tx.make_mesh(MESHES[how]) if how in MESHES else None
    by_pmap = how.startswith("pmap")
    launcher = tx.pmap_step(step, jax.devices()[: int(how[-1])]) if by_pmap else tx.jit_step(step, shapes, mesh)
    state, metrics = launcher.make_state(begin)(jax.random.key(0)), []
    for seed in range(3):
        state, metric = launcher.step(state, launcher.put_batch(make_batch(cfg, seed)))
        metrics.append(metric)
    return state, launcher.host_state(state), np.array(metrics)


ALL = list(itertools.product(MODELS, ["pmap 8", "accumulation 8", *MESHES]))


# By pmap on 2, each has 4 rows, which 2 divides: nothing may take the axis of pmap for one of a mesh.
@pytest.mark.parametrize(("model", "how"), [*ALL, ("experts", "pmap 2")])
def test_any_number_of_devices_gives_the_same_update(model, how):
    (placed, state, metrics), (_, expected, expected_metrics) = updated(model, how), updated(model)
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-5)
    for got, want in ((state.params, expected.params), (state.ema, expected.ema)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), got, want)
    assert state.step == 3
    n_parts = {"fsdp 8": 8, "data 2 × tensor 4": 4}.get(how)  # of matrices, and of their moments
    moments = (placed.opt_state[1][0].mu, placed.opt_state[1][0].nu)
    for at in jax.tree.leaves((placed.params, moments)) if n_parts else ():
        n = n_parts if at.ndim > 1 and at.shape not in WHOLE else 1
        assert at.addressable_shards[0].data.size * n == at.size, at.shape


WHOLE = ((T, 16), (4, 16))  # on every device: GPT's positions, which 8 does not divide, and the router


def test_a_split_sequence_is_put_together_only_for_its_keys():
    """Left to XLA, the same program sends parts of queries and scores about, by hundreds of messages."""
    cfg, t = dataclasses.replace(LLAMA, max_len=1024, d_model=64), 1024
    built, optimizer = tx.build(cfg), tx.make_optimizer(ADAMW, n_steps=100)
    shapes = jax.eval_shape(functools.partial(tx.init_state, built, optimizer), jax.random.key(0))
    batch = Batch(*(np.zeros((1, t), dtype) for dtype in (np.int32, np.int32, np.float32)))
    launcher = tx.jit_step(tx.make_train_step(built, optimizer), shapes, tx.make_mesh(MeshConfig(data=1, sequence=8)))
    compiled = launcher.lower(shapes, launcher.put_batch(batch)).compile().as_text()
    sent = collections.Counter(re.findall(r" (all-gather|all-to-all|collective-permute|all-reduce)\(", compiled))
    assert sent["all-gather"] <= 2  # keys and values
    assert sent["collective-permute"] == sent["all-to-all"] == 0


def test_attention_over_a_sequence_is_that_of_one_device():
    """Forward and backward, with segments, a window and positions of several kinds."""
    keys = jax.random.split(jax.random.key(1), 4)
    q, v_out = (jax.random.normal(key, (2, 16, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 16, 2, 8)) for key in keys[2:])
    segments = jnp.asarray(np.repeat([[0, 1, 2, 2], [0, 0, 1, 1]], 4, axis=1))
    positions = jnp.tile(jnp.arange(4), 4)[None] + 4 * jnp.asarray(np.repeat([[0, 0, 0, 1], [0, 1, 0, 1]], 4, axis=1))
    masks = {
        "causal": Mask(causal=True),
        "window": Mask(causal=True, window=5),
        "segments": Mask(
            causal=True, q_segments=segments, k_segments=segments, q_positions=positions, k_positions=positions
        ),
        "both ways": Mask(),
    }
    mesh = tx.make_mesh(MeshConfig(data=1, sequence=4, tensor=2))
    for name, mask in masks.items():
        for impl in ("xla", "blockwise"):

            def loss(q, k, v, mask=mask, impl=impl):
                return (attention(q, k, v, mask, impl=impl, soft_cap=5.0) * v_out).sum()

            expected = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
            with jax.set_mesh(mesh):
                got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, atol=2e-6, err_msg=f"{name} {impl}")


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"data": 3}, r"^mesh data=3 needs 3 devices; there are 8, which the axes must multiply to$"),
        (
            {"fsdp": 4, "tensor": 4},
            r"^mesh fsdp=4 × tensor=4 needs 16 devices; there are 8, which .*$",
        ),
        ({"data": 1}, r"^mesh data=1 needs 1 devices; there are 8, which the axes must multiply to$"),
    ],
)
def test_a_mesh_of_other_devices_is_refused(sizes, says):
    with pytest.raises(tx.InputError, match=says):
        tx.make_mesh(MeshConfig(**sizes))


def test_what_does_not_divide_is_refused():
    with pytest.raises(tx.InputError, match=r"^mesh\.tensor=8 must divide model\.n_heads=4; use 1, 2, 4$"):
        check_mesh(tx.make_mesh(MeshConfig(tensor=8)), GPT)
    with pytest.raises(tx.InputError, match=r"^batch_size=12 must be a multiple of the 8 devices that share it; use 8"):
        check_batch(12, 8)
    with pytest.raises(tx.InputError, match=r"^batch_size=12 .* in accumulate_steps=2; use 8$"):
        check_batch(12, 4, 2)
    optimizer = tx.make_optimizer(ADAMW, n_steps=100)
    shapes = jax.eval_shape(functools.partial(tx.init_state, tx.build(GPT), optimizer), jax.random.key(0))
    launcher = tx.jit_step(lambda *_: None, shapes, tx.make_mesh(MeshConfig(sequence=8)))
    with pytest.raises(tx.InputError, match=r"^seq_len=12 must be a multiple of mesh\.sequence=8, which share it; use"):
        launcher.put_batch(make_batch(GPT, 0))
