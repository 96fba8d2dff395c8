"""Published models have the published number of parameters."""

import dataclasses
import functools
import math

import pytest

import tx_jax as tx
from tx_jax.presets import MODELS
from tx_jax.run_config import RunConfig
from tx_jax.run_presets import RUNS

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
    "mixtral-8x7b": 46_702_792_704,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "bert-base": 109_482_240,
}
PRINTED = {  # millions, in Table 3 of Vaswani et al. 2017; a blank is "identical to those of the base model"
    "vaswani-base": 65,
    "vaswani-a-1-head": 65, "vaswani-a-4-heads": 65, "vaswani-a-16-heads": 65, "vaswani-a-32-heads": 65,
    "vaswani-b-key-16": 58, "vaswani-b-key-32": 60,
    "vaswani-c-2-layers": 36, "vaswani-c-4-layers": 50, "vaswani-c-8-layers": 80,
    "vaswani-c-d-256": 28, "vaswani-c-d-1024": 168, "vaswani-c-mlp-1024": 53, "vaswani-c-mlp-4096": 90,
    "vaswani-d-dropout-0": 65, "vaswani-d-dropout-0.2": 65, "vaswani-e-learned": 65,
}  # fmt: skip
COUNTED = [name for name in PRINTED if name.startswith(("vaswani-base", "vaswani-b-", "vaswani-c-"))]  # not blank
BIG = {"vaswani-big": 214_171_648}  # printed: 213


@functools.cache
def count_of(name):
    return tx.count_params(MODELS[name]())


@pytest.mark.parametrize(("name", "count"), (PUBLISHED | BIG).items())
def test_parameter_count(name, count):
    assert count_of(name) == count


@pytest.mark.parametrize(("name", "millions"), PRINTED.items())
def test_the_count_that_the_paper_prints(name, millions):
    assert round(count_of(name) / 1e6) == millions


def vocabularies(name, millions):
    """The first and the last number of tokens with which a model, its table being shared, has a count so printed."""
    cfg = MODELS[name]()
    rest = count_of(name) - cfg.vocab_size * cfg.d_model
    ends = ((millions + half) * 1e6 for half in (-0.5, 0.5))
    first, last = ((end - rest) / cfg.d_model for end in ends)
    return math.ceil(first), math.ceil(last) - 1


def test_the_vocabulary_is_what_the_printed_counts_leave():
    """And big's is no exception of ours alone: no vocabulary is that of its count and of the others."""
    firsts, lasts = zip(*(vocabularies(name, PRINTED[name]) for name in COUNTED), strict=True)
    assert (max(firsts), min(lasts)) == (41_004, 41_208)
    assert vocabularies("vaswani-big", 213) == (35_368, 36_344)
    assert vocabularies("vaswani-base", 65) == (39_841, 41_793)


def test_every_model_preset_is_counted():
    assert set(MODELS) == set(PUBLISHED | PRINTED | BIG)


def test_rows_of_the_table_have_the_widths_that_it_prints():
    widths = {name: (cfg.d_model, cfg.F, cfg.n_heads, cfg.H, cfg.Hv) for name in PRINTED for cfg in [MODELS[name]()]}
    assert widths == dict.fromkeys(PRINTED, (512, 2048, 8, 64, 64)) | {
        "vaswani-a-1-head": (512, 2048, 1, 512, 512),
        "vaswani-a-4-heads": (512, 2048, 4, 128, 128),
        "vaswani-a-16-heads": (512, 2048, 16, 32, 32),
        "vaswani-a-32-heads": (512, 2048, 32, 16, 16),
        "vaswani-b-key-16": (512, 2048, 8, 16, 64),
        "vaswani-b-key-32": (512, 2048, 8, 32, 64),
        "vaswani-c-d-256": (256, 2048, 8, 32, 32),
        "vaswani-c-d-1024": (1024, 2048, 8, 128, 128),
        "vaswani-c-mlp-1024": (512, 1024, 8, 64, 64),
        "vaswani-c-mlp-4096": (512, 4096, 8, 64, 64),
    }


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", RUNS)
def test_run_presets_are_valid(name, backend):
    assert isinstance(RUNS[name](backend), RunConfig)


def test_demo_is_small_on_cpu_and_10m_elsewhere():
    models = {backend: RUNS["gpt-shakespeare"](backend).model for backend in ("cpu", "gpu")}
    sizes = {backend: tx.count_params(dataclasses.replace(cfg, vocab_size=65)) for backend, cfg in models.items()}
    assert sizes["cpu"] < 1e6 < 10e6 < sizes["gpu"] < 11e6
