"""A session is the whole text read at once, however it grew, and whatever was cut from it."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.decoding import session

V = 11
CFG = tx.ModelConfig(vocab_size=V, n_layers=2, n_heads=4, d_head=6, d_model=30, max_len=600, norm="rmsnorm")
CONFIGS = {
    "llama": CFG,
    "gpt2": replace(CFG, positions="learned"),
    "gemma2": replace(CFG, window=5, window_pattern="wf"),
}
TEXT = np.random.default_rng(0).integers(V, size=300)
QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def forward(model, params, tokens, positions):
    return model.apply({"params": params}, tokens, positions)[0]


def whole(model, params, ids):
    index = np.arange(len(TEXT))
    return forward(model, params, np.resize(ids, (1, len(TEXT))), np.where(index < len(ids), index, -1)[None])[
        0, len(ids) - 1
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_on_is_reading_at_once(name):
    model = tx.build(CONFIGS[name])
    params = tx.init_params(model, jax.random.key(0))
    held = session.start(model)
    other = TEXT[:90].copy()
    other[70:] = (other[70:] + 1) % V
    for ids in (TEXT[:7], TEXT[:7], TEXT[:100], other, TEXT[:60], TEXT):  # on, again, on, another turn, back, and on
        logits, held = session.read(model, params, held, ids)
        np.testing.assert_allclose(logits[0], whole(model, params, ids), rtol=0, atol=2e-5)
        assert held.ids == tuple(ids)
        assert held.cache.next_positions().tolist() == [len(ids)]


def test_writing_is_generating():
    model = tx.build(CFG)
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf, tx.init_params(model, jax.random.key(0)))
    expected = tx.generate(model, params, TEXT[None, :250], max_new_tokens=20).tokens[0].tolist()
    logits, held = session.read(model, params, session.start(model), TEXT[:250])
    steps = list(session.write(model, params, logits, held, max_new_tokens=20))  # past the cache's first 256 slots
    assert [token for token, _ in steps] == expected
    assert steps[-1][1].ids == (*TEXT[:250], *expected[:-1])
    after, _ = session.read(model, params, steps[-1][1], TEXT[:100])  # the last session goes on
    np.testing.assert_allclose(after[0], whole(model, params, TEXT[:100]), rtol=0, atol=2e-3)


def test_a_text_ends_at_max_len():
    model = tx.build(replace(CFG, max_len=12))
    params = tx.init_params(model, jax.random.key(0))
    logits, held = session.read(model, params, session.start(model), TEXT[:9])
    assert len(list(session.write(model, params, logits, held, max_new_tokens=99))) == 3
    with pytest.raises(tx.InputError, match=r"^the text has 13 tokens, max_len=12; begin a new one$"):
        session.read(model, params, session.start(model), TEXT[:13])
