"""muP: what a step changes does not depend on the width, where the standard parametrisation's changes grow with it."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import InputError, ModelConfig, OptimConfig, RunConfig

changes = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "coordinate_check.py"))["changes"]
WIDTHS = (64, 128, 256)


def test_coordinate_check():
    """From a width to four times it, logits and hidden vectors move as far with muP; without, much farther."""
    mup, standard = ([changes(width, base) for width in WIDTHS] for base in (64, None))
    for part in ("hidden", "logits"):
        grows = getattr(mup[-1], part) / getattr(mup[0], part)
        assert 0.6 < grows < 1.4, f"{part} × {grows}"
        steady = getattr(standard[-1], part) / getattr(standard[0], part)
        assert steady > 1.8, f"{part} × {steady}"


def test_at_its_base_width_it_is_the_standard_parametrisation_but_for_the_scores():
    sizes = {"vocab_size": 7, "d_model": 128, "n_heads": 2, "n_layers": 1}
    base, plain = ModelConfig(mup_base_width=128, **sizes), ModelConfig(**sizes)
    assert base.score_scale == plain.score_scale == 1 / 8
    params = [tx.init_params(tx.build(cfg), jax.random.key(0)) for cfg in (base, plain)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    logits = [tx.build(cfg).apply({"params": params[0]}, jnp.ones((1, 3), int))[0] for cfg in (base, plain)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("wrong", [{"init": "xavier"}, {"scale_embeddings": True}, {"scale_head": True}])
def test_scales_of_ones_own_are_refused(wrong):
    text = "mup_base_width=64 has scales of its own; use init='normal', without scale_embeddings and scale_head"
    with pytest.raises(InputError, match="^" + re.escape(text)):
        ModelConfig(mup_base_width=64, **wrong)


def test_numbers_are_refused():
    with pytest.raises(InputError, match=r"^mup_base_width=0 must be at least 1, or None for no muP$"):
        ModelConfig(mup_base_width=0)
    text = "model.mup_base_width=64 has learning rates of adamw, lion and schedule-free, not of optim.name='muon'"
    with pytest.raises(InputError, match="^" + re.escape(text)):
        RunConfig(model=ModelConfig(mup_base_width=64), optim=OptimConfig(name="muon"))


def test_no_other_library_has_its_scales(tmp_path):
    """They are refused by name rather than lost."""
    sizes = {"vocab_size": 7, "d_model": 128, "n_heads": 2, "n_layers": 1, "mlp": "swiglu", "norm": "rmsnorm"}
    for base in (128, 64):
        cfg = ModelConfig(mup_base_width=base, **sizes)
        params = tx.init_params(tx.build(cfg), jax.random.key(0))
        with pytest.raises(InputError, match=rf"mup_base_width={base}"):
            tx.save_pretrained(tmp_path / str(base), cfg, params)
