"""Law 9: a step is one function, whatever its memory is spent on, and models learn by it."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import Batch, ModelConfig, OptimConfig
from tx_jax.data.batches import PairBatch

V, B, T = 16, 8, 11
CFG = ModelConfig(vocab_size=V, d_model=16, n_heads=4, n_kv_heads=2, n_layers=1, biases="all", mlp="swiglu")
# With an ε this large an update is nearly linear in the gradient; otherwise rounding decides the sign of small ones.
ADAMW = OptimConfig(schedule="constant", warmup_steps=0, peak_lr=0.01, eps=1e-2)
KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # quick to compile
init = jit(tx.init_state, static_argnums=(0, 1))


def make(model=CFG, optim=ADAMW, remat="none", **more):
    """A model, its step and its first state: a new one each time, because a launcher gives the old one up."""
    model, optimizer = tx.build(model, remat), tx.make_optimizer(optim, n_steps=100)
    return model, tx.make_train_step(model, optimizer, **more), init(model, optimizer, KEY)


def make_batch(seed=0, lengths=(0, 1, 11, 2, 0, 11, 3, 5)):
    """Rows of very unequal length: row 0 of none."""
    tokens = np.random.default_rng(seed).integers(V, size=(B, T + 1)).astype(np.int32)
    real = np.arange(T) < np.array(lengths)[:, None]
    positions = np.where(real, np.arange(T), -1).astype(np.int32)
    return Batch(*(jnp.asarray(x) for x in (tokens[:, :-1], tokens[:, 1:], real.astype(np.float32), positions)))


TWO_KINDS = {"n_layers": 3, "window": 4, "window_pattern": "wf"}  # one of them is left over
MODELS = {
    "two kinds of layers": dataclasses.replace(CFG, **TWO_KINDS),
    "encoder-decoder": dataclasses.replace(CFG, stack="encoder_decoder", n_layers=2, n_encoder_layers=1),
}


def make_inputs(cfg):
    """A batch of its model."""
    batch = make_batch()
    if cfg.stack != "encoder_decoder":
        return batch
    source = jnp.asarray(np.random.default_rng(1).integers(V, size=(B, T)), jnp.int32)
    return PairBatch(source, *batch[:3], batch.positions[::-1], batch.positions)


@functools.cache
def plain_step(name):
    _, step, state = make(MODELS[name])
    return jit(step)(state, make_inputs(MODELS[name]))


def same_update(one, other):
    (state, metrics), (expected, expected_metrics) = one, other
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6),
        tx.unstack_layers((state.params, state.opt_state)),
        (expected.params, expected.opt_state),
    )


@pytest.mark.parametrize(("name", "n"), [("two kinds of layers", 8), ("encoder-decoder", 2)])
def test_parts_in_turn_are_the_whole_batch(name, n):
    """Though the padding is so uneven that some parts hold nothing."""
    _, step, state = make(MODELS[name], accumulate_steps=n)
    same_update(jit(step)(state, make_inputs(MODELS[name])), plain_step(name))


LAYOUTS = {"loop": lambda tree, period: tree, "scan": tx.stack_layers}


@pytest.mark.parametrize(
    ("name", "layout", "remat"),
    [
        ("two kinds of layers", "loop", "names"),
        ("two kinds of layers", "scan", "dots"),
        ("encoder-decoder", "scan", "none"),
        ("encoder-decoder", "scan", "full"),
    ],
)
def test_stacked_layers_and_remat_change_no_update(name, layout, remat):
    cfg = MODELS[name]
    _, step, state = make(cfg, remat=remat)
    state = LAYOUTS[layout](state, len(cfg.window_pattern))
    same_update(jit(step)(state, make_inputs(cfg)), plain_step(name))


@pytest.mark.parametrize(("period", "over"), [(1, []), (2, ["blocks_2"])])
def test_stacking_loses_no_bit(period, over):
    _, _, state = make(MODELS["two kinds of layers"])
    stacked = tx.stack_layers(state, period)
    assert [name for name in stacked.params["stack"] if name.startswith("blocks")] == over
    assert stacked.params["stack"]["scanned"].keys() == {str(i) for i in range(period)}
    back = tx.unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for one, other in ((back.params, state.params), (back.opt_state, state.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_remat_keeps_less_and_a_deep_scan_compiles_no_more():
    """As XLA counts bytes; in instructions, because seconds are the machine's."""
    batch = Batch(*(jax.ShapeDtypeStruct((4, 64), dtype) for dtype in ("int32", "int32", "float32")))

    def compiled(n_layers, remat="none"):
        cfg = dataclasses.replace(CFG, n_layers=n_layers)
        model, optimizer = tx.build(cfg, remat), tx.make_optimizer(ADAMW, n_steps=100)
        state = jax.eval_shape(lambda key: tx.stack_layers(tx.init_state(model, optimizer, key)), KEY)
        return jit(tx.make_train_step(model, optimizer)).lower(state, batch).compile()

    bytes_kept = {name: compiled(8, name).memory_analysis().temp_size_in_bytes for name in ("none", "dots", "full")}
    assert bytes_kept["full"] < bytes_kept["dots"] < bytes_kept["none"]
    assert len(compiled(48).as_text().splitlines()) <= 1.3 * len(compiled(4).as_text().splitlines())


def test_a_cache_needs_layers_that_are_not_stacked():
    model, _, state = make()
    stacked, cache = tx.stack_layers(state.params), tx.init_cache(CFG, 1, 8)
    with pytest.raises(tx.InputError, match=r"^parameters are stacked for training, and a cache is not; use unstack_l"):
        model.apply({"params": stacked}, jnp.ones((1, 2), int), cache=cache)


def test_a_remat_that_is_not_there_is_refused():
    with pytest.raises(tx.InputError, match=r"^remat='all' is not one of none, full, dots, names$"):
        tx.build(CFG, "all")


def test_neither_memory_nor_source_is_refused():
    model = tx.build(MODELS["encoder-decoder"])
    with pytest.raises(tx.InputError, match=r"^memory=None needs a source; give what encode gave, or the source"):
        model.apply({"params": {}}, jnp.ones((1, 2), int), method="hidden")


def test_a_batch_of_uneven_parts_is_refused():
    _, step, state = make(accumulate_steps=3)
    with pytest.raises(tx.InputError, match=r"^a batch of 8 rows is no multiple of accumulate_steps=3; change"):
        jax.eval_shape(step, state, make_batch())


def test_metrics_are_those_of_numpy():
    model, step, state = make(label_smoothing=0.1)
    batch = make_batch()
    _, metrics = jit(step)(state, batch)
    logits = np.float64(jit(model.apply)({"params": state.params}, batch.tokens, batch.positions)[0])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    gold = np.take_along_axis(log_p, np.asarray(batch.targets)[..., None], -1)[..., 0]
    nats = -((0.9 * gold + 0.1 * log_p.mean(-1)) * batch.weights).sum()
    assert metrics.n_tokens == batch.weights.sum() == 33
    np.testing.assert_allclose(metrics.loss, nats / 33, rtol=1e-5)
    total, count = jit(tx.make_eval_step(model))(state.params, batch)
    np.testing.assert_allclose(total, -(gold * batch.weights).sum(), rtol=1e-5)  # without smoothing
    assert count == 33


def test_grad_norm_is_that_of_the_mean_before_clipping():
    model, step, state = make(optim=OptimConfig(clip_norm=1e-6))
    batch = make_batch()

    def loss(params):
        total, count = tx.cross_entropy(model.apply({"params": params}, *batch[:1], batch.positions)[0], *batch[1:3])
        return total / count

    squares = jax.tree.map(lambda g: (g**2).sum(), jit(jax.grad(loss))(state.params))
    np.testing.assert_allclose(jit(step)(state, batch)[1].grad_norm, sum(jax.tree.leaves(squares)) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_batch_without_weight_leaves_only_the_decay_of_weights(weight_decay):
    """From a fresh state, where no momentum goes on: × (1 − learning rate · decay) for matrices."""
    _, step, state = make(
        optim=OptimConfig(schedule="constant", warmup_steps=0, peak_lr=0.5, weight_decay=weight_decay)
    )
    after, metrics = jit(step)(state, make_batch(lengths=[0] * B))
    assert metrics == (0, 0, 0, False)
    for old, new in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(new, old * (1 - 0.5 * weight_decay * (old.ndim >= 2)), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])  # 3e38: a loss that is finite, with a gradient that is not
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(bad):
    _, step, state = make(ema_rate=0.9)
    state, batch = state._replace(ema=state.params), make_batch()
    after, metrics = jit(step)(state, batch._replace(weights=batch.weights.at[2, 3].set(bad)))
    assert metrics.skipped
    assert after.step == state.step + 1
    again = after._replace(step=state.step)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(bits, (a, b))), again, state)
    assert not jit(step)(after, batch)[1].skipped


def test_that_a_step_may_be_skipped_takes_no_memory():
    _, step, state = make(dataclasses.replace(CFG, positions="learned", max_len=99_000))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    compiled = jax.jit(step, donate_argnums=0).lower(state, make_batch()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * held  # 4 where each leaf is chosen


def bits(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def test_dropout_is_a_function_of_the_step_and_off_in_evaluation():
    drops = ModelConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=1, dropout_rate=0.3, attention_dropout_rate=0.3)
    model, step, state = make(drops)
    step, evaluate, batch = jit(step), jit(tx.make_eval_step(model)), make_batch()
    losses = [float(step(state._replace(step=jnp.int32(i)), batch)[1].loss) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    other_key = step(state._replace(key=jax.random.key(9)), batch)[1].loss
    assert other_key != losses[0]
    total, count = evaluate(state.params, batch)
    assert total / count not in losses
    assert step(state, batch)[0].key == state.key


def test_bfloat16_computes_with_parameters_in_float32():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        _, step, state = make(ModelConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=1, dtype=dtype))
        state, metrics = jit(step)(state, make_batch())
        losses[dtype] = float(metrics.loss)
        floats = [
            leaf
            for leaf in jax.tree.leaves((state.params, state.opt_state))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert losses["float32"] != losses["bfloat16"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=5e-3)


def test_overfits_one_batch():
    _, step, state = make(optim=OptimConfig(schedule="constant", warmup_steps=0, peak_lr=1e-2))
    step, batch, losses = jit(step), make_batch(lengths=[T] * B), []
    batch = batch._replace(
        tokens=batch.tokens.at[:, 0].set(jnp.arange(B))
    )  # rows that begin alike could not be told apart
    for _ in range(100):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert abs(losses[0] - np.log(V)) < 0.2  # at first, nothing is known
    assert losses[-1] < 0.05


class Pairs(NamedTuple):
    """A batch of translations."""

    source: jax.Array
    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array

    @property
    def inputs(self):
        return {"source": self.source, "tokens": self.tokens}


def test_an_encoder_decoder_learns_to_reverse():
    n, start = 5, 0
    sizes = {"vocab_size": 10, "max_len": 16, "d_model": 32, "n_heads": 4, "n_layers": 1, "d_mlp": 64}
    cfg = ModelConfig(
        stack="encoder_decoder", positions="sinusoidal", mlp="relu", scale_embeddings=True, init="xavier", **sizes
    )
    model, step, state = make(cfg, OptimConfig(schedule="constant", peak_lr=5e-3, warmup_steps=20))
    step, rng = jit(step, donate_argnums=0), np.random.default_rng(0)
    for _ in range(200):
        source = rng.integers(1, 10, size=(64, n)).astype(np.int32)
        tokens = np.pad(source[:, :0:-1], ((0, 0), (1, 0)), constant_values=start)
        state, _ = step(
            state, Pairs(*map(jnp.asarray, (source, tokens, source[:, ::-1], np.ones(source.shape, np.float32))))
        )
    source = jnp.asarray(rng.integers(1, 10, size=(200, n)), jnp.int32)
    memory = jit(model.apply, static_argnames="method")({"params": state.params}, source, method="encode")
    result = tx.generate(model, state.params, np.full((200, 1), start), max_new_tokens=n, memory=memory)
    assert (np.asarray(result.tokens) == source[:, ::-1]).mean() > 0.95
