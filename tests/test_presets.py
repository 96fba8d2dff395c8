"""Published models have the published number of parameters."""

import dataclasses

import pytest

import tx_jax as tx
from tx_jax.presets import MODELS, RUNS
from tx_jax.run_config import RunConfig

# Sizes of the released checkpoints (safetensors metadata of their model pages), or as noted.
PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "bert-base": 109_482_240,
}
# Table 3 of Vaswani et al. 2017 prints 65 and 213 (10⁶). With the 37,000 tokens of §5.1 its own sizes give these.
VASWANI = {"vaswani-base": 63_045_632, "vaswani-big": 214_171_648}


@pytest.mark.parametrize(("name", "count"), (PUBLISHED | VASWANI).items())
def test_parameter_count(name, count):
    assert tx.count_params(MODELS[name]()) == count


def test_every_model_preset_is_counted():
    assert set(MODELS) == set(PUBLISHED | VASWANI)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", RUNS)
def test_run_presets_are_valid(name, backend):
    assert isinstance(RUNS[name](backend), RunConfig)


def test_demo_is_small_on_cpu_and_10m_elsewhere():
    models = {backend: RUNS["gpt-shakespeare"](backend).model for backend in ("cpu", "gpu")}
    sizes = {backend: tx.count_params(dataclasses.replace(cfg, vocab_size=65)) for backend, cfg in models.items()}
    assert sizes["cpu"] < 1e6 < 10e6 < sizes["gpu"] < 11e6
