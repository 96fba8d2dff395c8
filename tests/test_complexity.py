"""What a model costs is what XLA counts in the program that it compiles."""

import jax
import jax.numpy as jnp
import pytest

import tx_jax as tx
from tx_jax.complexity import make_train_flops

SIZES = {"vocab_size": 97, "d_model": 128, "n_heads": 4, "n_layers": 2, "max_len": 64}
IDS = jnp.ones((2, 48), int)
ONES = jnp.ones((2, 48))
TEXT = tx.Batch(IDS, IDS, ONES)
PAIRS = tx.PairBatch(jnp.ones((2, 32), int), IDS, IDS, ONES)


@pytest.mark.parametrize(
    ("more", "batch"),
    [
        ({}, TEXT),
        ({"n_kv_heads": 2, "mlp": "swiglu", "tie_head": False, "positions": "learned"}, TEXT),
        ({"stack": "encoder_decoder", "n_encoder_layers": 3}, PAIRS),
        ({"stack": "encoder_decoder", "tie_source": False}, PAIRS),
    ],
)
def test_flops_are_those_of_the_compiled_step(more, batch):
    cfg = tx.ModelConfig(**SIZES, **more)
    model = tx.build(cfg)
    shapes = jax.eval_shape(lambda key: tx.init_params(model, key), jax.random.key(0))
    loss = lambda params: tx.make_eval_step(model)(params, batch)[0]  # noqa: E731
    cost = jax.jit(jax.grad(loss)).lower(shapes).compile().cost_analysis()
    counted = (cost[0] if isinstance(cost, list) else cost)["flops"]
    assert make_train_flops(cfg)(batch) == pytest.approx(counted, rel=0.1)  # XLA also counts norms and activations


def test_padding_and_what_is_frozen_need_less_and_a_window_sees_less():
    cfg = tx.ModelConfig(**SIZES)
    all_of_it, half = make_train_flops(cfg)(TEXT), jnp.where(jnp.arange(48) < 24, jnp.arange(48), -1)
    assert make_train_flops(cfg)(TEXT._replace(positions=jnp.broadcast_to(half, (2, 48)))) == all_of_it / 2
    attention = 2 * 48 * 2 * 12 * 128 * 48
    assert make_train_flops(cfg, adapters=True)(TEXT) - attention == pytest.approx((all_of_it - attention) * 2 / 3)
    windowed = make_train_flops(tx.ModelConfig(**SIZES, window=12, window_pattern="wf"))
    assert all_of_it - windowed(TEXT) == pytest.approx(attention / 2 * 3 / 4)
