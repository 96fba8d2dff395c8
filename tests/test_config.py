"""Configs: to JSON and back without loss; and every rule by its text."""

import dataclasses
import importlib.util
import json
import math
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_jax import config as checked
from tx_jax import run_config as checked_runs
from tx_jax.config_json import from_json, to_json
from tx_jax.errors import InputError
from tx_jax.presets import MODELS
from tx_jax.run_presets import RUNS


# The modules once more, as a user has them: under pytest jaxtyping would refuse wrong types before our own rules do.
def plain(module, **others):
    spec = importlib.util.spec_from_file_location(f"plain_{module.__name__}", module.__file__)
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, other in others.items():
            patch.setitem(sys.modules, f"tx_jax.{name}", other)
        spec.loader.exec_module(found)
    return found


config = plain(checked)
runs = plain(checked_runs, config=config)
Model, Rotary = config.ModelConfig, config.RotaryConfig
Run, Data, Optim, Train, Mesh = runs.RunConfig, runs.DataConfig, runs.OptimConfig, runs.TrainConfig, runs.MeshConfig
PRESETS = {name: make() for name, make in MODELS.items()} | {name: make("gpu") for name, make in RUNS.items()}

IMPOSSIBLE = [  # (class, fields, what the message says)
    # choices: the value, the choices, and the nearest of them
    (Model, {"stack": "decodr"}, "'decodr' is not one of decoder, encoder, encoder_decoder; did you mean 'decoder'?"),
    (Model, {"positions": "rotery"}, "did you mean 'rotary'?"),
    (Model, {"positions": 7}, "positions=7 is not one of none, sinusoidal, "),
    (Model, {"mlp": "swish"}, "mlp='swish' is not one of relu, gelu, gelu_tanh, silu, swiglu, geglu, geglu_tanh"),
    (Model, {"norm": "batchnorm"}, "norm='batchnorm' is not one of layernorm, rmsnorm"),
    (Model, {"norm_order": "middle"}, "norm_order='middle' is not one of pre, post"),
    (Model, {"biases": "some"}, "biases='some' is not one of none, norm, mlp, qkv, attention, all"),
    (Model, {"init": "zeros"}, "init='zeros' is not one of normal, xavier"),
    (Model, {"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16; did you mean 'bfloat16'?"),
    (Rotary, {"scaling": "llama"}, "did you mean 'llama3'?"),
    (Optim, {"schedule": "cosin"}, "did you mean 'cosine'?"),
    (Data, {"corpus": "pile"}, "corpus='pile' is not one of tiny_shakespeare"),
    (Data, {"tokenizer": "bytes"}, "did you mean 'byte'?"),
    # types
    (Model, {"n_layers": "6"}, "n_layers='6' is str; it must be int"),
    (Model, {"n_layers": 6.0}, "n_layers=6.0 is float; it must be int"),
    (Model, {"n_layers": True}, "n_layers=True is bool; it must be int"),
    (Model, {"window": "all"}, "window='all' is str; it must be int or None"),
    (Model, {"tie_head": 1}, "tie_head=1 is int; it must be bool"),
    (Model, {"rotary": 10_000.0}, "rotary=10000.0 is float; it must be RotaryConfig"),
    (Run, {"model": None}, "model=None is NoneType; it must be ModelConfig"),
    (Run, {"run_dir": None}, "run_dir=None is NoneType; it must be str"),
    (Data, {"path": 3}, "path=3 is int; it must be str or None"),
    # numbers by their names
    (Model, {"n_layers": 0}, "n_layers=0 must be at least 1"),
    (Model, {"n_heads": -8}, "n_heads=-8 must be at least 1"),
    (Model, {"n_kv_heads": 0}, "n_kv_heads=0 must be at least 1"),
    (Model, {"d_model": 0}, "d_model=0 must be at least 1"),
    (Model, {"d_head": 0}, "d_head=0 must be at least 1"),
    (Model, {"d_value": 0}, "d_value=0 must be at least 1"),
    (Model, {"d_mlp": -1}, "d_mlp=-1 must be at least 1"),
    (Model, {"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    (Model, {"max_len": 0}, "max_len=0 must be at least 1"),
    (Model, {"n_token_types": -1}, "n_token_types=-1 must be at least 0"),
    (Model, {"dropout_rate": 1.0}, "dropout_rate=1.0 is a probability; it must be in [0, 1)"),
    (Model, {"attention_dropout_rate": -0.1}, "attention_dropout_rate=-0.1 is a probability"),
    (Train, {"label_smoothing_rate": 1.5}, "label_smoothing_rate=1.5 is a probability"),
    (Model, {"norm_eps": math.nan}, "norm_eps=nan must be a finite number"),
    (Optim, {"peak_lr": math.inf}, "peak_lr=inf must be a finite number"),
    (Data, {"seq_len": 0}, "seq_len=0 must be at least 1"),
    (Data, {"batch_size": 0}, "batch_size=0 must be at least 1"),
    (Train, {"n_steps": 0}, "n_steps=0 must be at least 1"),
    (Train, {"seed": -1}, "seed=-1 must not be negative"),
    (Train, {"log_every": -1}, "log_every=-1 must not be negative"),
    (Optim, {"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
    (Optim, {"decay_steps": -1}, "decay_steps=-1 must not be negative"),
    (Run, {"model": Data()}, "must be ModelConfig"),
    # relations, with a remedy
    (
        Run,
        {"optim": Optim(schedule="wsd", warmup_steps=90, decay_steps=20), "train": Train(n_steps=100)},
        "optim.decay_steps=20 must be 1 to 10: train.n_steps=100 without the warm-up",
    ),
    (Model, {"d_model": 6, "n_heads": 4}, "d_model=6 must be a multiple of n_heads=4; use 1, 2, 3, 6 heads, or"),
    (Model, {"n_heads": 8, "n_kv_heads": 3}, "n_heads=8 must be a multiple of n_kv_heads=3; use 1, 2, 4, 8"),
    (Model, {"d_head": 5}, "fraction=1.0 must be even and positive for positions='rotary', which turns pairs"),
    (Model, {"d_head": 5, "positions": "rotary_pairs"}, "must be even and positive for positions='rotary_pairs'"),
    (Model, {"d_model": 9, "d_head": 2, "positions": "sinusoidal"}, "d_model=9 must be even for positions='sin"),
    (Model, {"positions": "t5", "n_buckets": 6}, "n_buckets=6 must be a multiple of 4"),
    (Model, {"positions": "t5", "max_distance": 16}, "max_distance=16 must exceed n_buckets / 2 = 16"),
    (Model, {"norm_eps": 0.0}, "norm_eps=0.0 must be positive; LayerNorm's usual value is 1e-5"),
    (Model, {"window_pattern": "wx"}, "window_pattern='wx' must be letters w and f, such as wf"),
    (Model, {"window_pattern": ""}, "window_pattern='' must be letters w and f, such as wf"),
    (Model, {"position_offset": -1}, "position_offset=-1 must not be negative"),
    (Model, {"parallel": True, "norm_order": "post"}, "parallel=True needs norm_order='pre', not 'post'"),
    (Model, {"attention_scale": 0.0}, "attention_scale=0.0 must be positive, or None for none"),
    (Model, {"d_head": 4, "rotary": Rotary(fraction=0.2)}, "d_head=4 × rotary.fraction=0.2 must be even and positive"),
    (Rotary, {"fraction": 0.0}, "fraction=0.0 must be above 0 and at most 1, the whole head"),
    (Rotary, {"window_base": 1.0}, "window_base=1.0 must exceed 1; RoFormer uses 10000"),
    (Model, {"window": 0}, "window=0 must be positive, or None for none"),
    (Model, {"attention_soft_cap": 0.0}, "attention_soft_cap=0.0 must be positive, or None"),
    (Model, {"head_soft_cap": -30.0}, "head_soft_cap=-30.0 must be positive, or None"),
    (Model, {"n_encoder_layers": 6}, "n_encoder_layers needs stack='encoder_decoder', not 'decoder'"),
    (Model, {"pooler": True}, "pooler=True needs stack='encoder', not 'decoder'"),
    (Rotary, {"base": 1.0}, "base=1.0 must exceed 1; RoFormer uses 10000"),
    (Rotary, {"factor": 0.5}, "factor=0.5 must be at least 1; it stretches the context"),
    (Rotary, {"low_freq_factor": 4.0}, "low_freq_factor=4.0 must be positive and below high_freq_factor=4.0"),
    (Rotary, {"beta_slow": 32.0}, "beta_slow=32.0 must be positive and below beta_fast=32.0"),
    (Data, {"valid_fraction": 0.0}, "valid_fraction=0.0 must be between 0 and 1; 0.1 holds out a tenth"),
    (Data, {"valid_fraction": 1.0}, "valid_fraction=1.0 must be between 0 and 1"),
    (Optim, {"peak_lr": 0.0}, "peak_lr=0.0 must be positive; try 1e-3"),
    (Optim, {"end_lr": 1e-2}, "end_lr=0.01 must be from 0 to peak_lr=0.001; lower --optim.end-lr, too"),
    (Optim, {"beta1": 1.0}, "beta1=1.0 must be in [0, 1)"),
    (Optim, {"beta2": -0.5}, "beta2=-0.5 must be in [0, 1)"),
    (Optim, {"eps": 0.0}, "eps=0.0 must be positive; Adam's usual value is 1e-8"),
    (Optim, {"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
    (Optim, {"clip_norm": 0.0}, "clip_norm=0.0 must be positive, or None for no clipping"),
    (Optim, {"schedule": "noam", "warmup_steps": 0}, "schedule='noam' needs warmup_steps of at least 1"),
    (Train, {"accumulate_steps": 0}, "accumulate_steps=0 must be at least 1, the whole batch at once"),
    (Train, {"remat": "all"}, "remat='all' is not one of none, full, dots, names"),
    (
        Run,
        {"data": Data(batch_size=12), "train": Train(accumulate_steps=5)},
        "data.batch_size=12 must be a multiple of train.accumulate_steps=5; use 1, 2, 3, 4, 6, 12 of them",
    ),
    (
        Run,
        {"init": "smollm2", "lora": runs.LoraConfig(rank=4), "train": Train(scan_layers=True)},
        "train.scan_layers=True stacks whole layers, and lora.rank=4 adapts parts of some; leave out",
    ),
    (Train, {"n_averaged": 3}, "n_averaged=3 exceeds keep=2, the checkpoints there are; raise --train.keep"),
    (Train, {"n_averaged": 2, "ema_rate": 0.9}, "n_averaged=2 and ema_rate=0.9 are two means"),
    (Data, {"objective": "translate", "corpus": "number_words", "test_fraction": 0.95}, "test_fraction=0.95 must be"),
    (Data, {"objective": "translate"}, "corpus='tiny_shakespeare' is not for objective='translate'; give --data.path"),
    (Data, {"corpus": "number_words"}, "corpus='number_words' is not for objective='next_token'"),
    (Data, {"target_path": "b"}, "target_path='b' goes with objective='translate' and a path of sources; give both"),
    (Run, {"data": Data(objective="masked_lm")}, "data.objective='masked_lm' trains model.stack='encoder', not 'dec"),
    (Run, {"data": Data(bad_lines="skip")}, "data.bad_lines='skip' has no effect with data.objective='next_token'"),
    (
        Run,
        {"data": Data(objective="masked_lm"), "train": Train(sample_prompt="a"), "model": Model(stack="encoder")},
        "train.sample_prompt='a' has no effect with data.objective='masked_lm'; leave it out",
    ),
    (Train, {"keep": 0}, "keep=0 must be at least 1, the newest checkpoint"),
    (Train, {"sample_tokens": 0}, "sample_tokens=0 must be at least 1; sample_every=0 stops samples"),
    (Mesh, {"data": 0}, "mesh.data=0 must be at least 1, or None"),
    (Mesh, {"tensor": -2}, "mesh.tensor=-2 must be at least 1, or None"),
    (Run, {"data": Data(seq_len=2048)}, "data.seq_len=2048 exceeds model.max_len=1024; raise model.max_len or"),
    (runs.LoraConfig, {"rank": -1}, "lora.rank=-1 must not be negative; 0 trains all parameters"),
    (runs.LoraConfig, {"alpha": 0.0}, "lora.alpha=0.0 must be positive; twice the rank is usual"),
    (runs.LoraConfig, {"alpha": 8.0}, "lora.alpha=8.0 has no effect with lora.rank=0, which trains all parameters"),
    (runs.LoraConfig, {"targets": "q"}, "lora.targets='q' has no effect with lora.rank=0"),
    (Run, {"lora": runs.LoraConfig(rank=4)}, "lora.rank=4 needs a model to adapt; give --init"),
    (Run, {"run_dir": ""}, "run_dir='' names no directory; use --run-dir runs/NAME"),
    (Run, {"train": Train(n_steps=50)}, "optim.warmup_steps=100 exceeds train.n_steps=50; shorten it by --optim"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "says"), IMPOSSIBLE, ids=[row[2][:40] for row in IMPOSSIBLE])
def test_impossible(kind, fields, says):
    with pytest.raises(InputError, match=f"^[^\n]*{re.escape(says)}[^\n]*$"):
        kind(**fields)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_to_json_and_back(name):
    preset = PRESETS[name]
    copy = from_json(type(preset), to_json(preset))
    assert copy == preset
    assert hash(copy) == hash(preset)


NUMBERS = st.floats(1e-9, 1e9, allow_nan=False)
MODEL_CONFIGS = st.builds(
    Model, vocab_size=st.none() | st.integers(1), max_len=st.integers(1024), n_layers=st.integers(1),
    d_model=st.sampled_from([16, 48]), n_heads=st.sampled_from([4, 8]), n_kv_heads=st.sampled_from([None, 1, 4]),
    norm_eps=NUMBERS, head_soft_cap=st.none() | NUMBERS, tie_head=st.booleans(),
    rotary=st.builds(Rotary, base=st.floats(2, 1e9), factor=st.floats(1, 1e9)),
)  # fmt: skip


@settings(deadline=None)  # a slow machine is no error
@given(run_dir=st.text(min_size=1), prompt=st.text(), rate=NUMBERS, model=MODEL_CONFIGS)
def test_any_run_goes_to_json_and_back(run_dir, prompt, rate, model):
    optim, train = Optim(peak_lr=rate, end_lr=rate / 3), Train(sample_prompt=prompt)
    run = Run(run_dir=run_dir, model=model, optim=optim, train=train, mesh=Mesh(fsdp=2))
    assert from_json(Run, to_json(run)) == run


REFUSED = [  # (text, what the message says)
    ("{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    ("[1, 2]", "RunConfig=[1, 2] must be a JSON object of its fields"),
    (
        '{"modle": {}}',
        "RunConfig has no field modle; its fields are run_dir, init, model, data, optim, ",
    ),
    ('{"model": {"b": 1, "a": 2}}', "ModelConfig has no field a, b; its fields are stack, vocab_size, "),
    ('{"model": {"rotary": 3}}', "RotaryConfig=3 must be a JSON object of its fields"),
    ('{"model": {"n_layers": 0}}', "n_layers=0 must be at least 1"),
    ('{"optim": {"eps": NaN}}', "eps=nan must be a finite number"),
    ('{"optim": {"eps": 1e999}}', "eps=inf must be a finite number"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_json_refused(text, says):
    with pytest.raises(InputError, match=f"^[^\n]*{re.escape(says)}[^\n]*$"):
        from_json(Run, text)


def test_every_field_is_in_the_json():
    values = json.loads(to_json(Run()))
    for field in dataclasses.fields(Run):
        if dataclasses.is_dataclass(field.type):
            assert values[field.name].keys() == {inner.name for inner in dataclasses.fields(field.type)}
