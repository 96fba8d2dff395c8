"""Directories of public models: what is wrong in config.json or in the tensors is named, and what is right loads."""

import json
import math
import pathlib
import time

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.convert.files import INDEX, open_safetensors, save_safetensors
from tx_jax.convert.pretrained import FAMILIES, read_family
from tx_jax.errors import InputError

SMALL = tx.ModelConfig(
    vocab_size=11, max_len=32, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=12, positions="rotary",
    mlp="swiglu", norm="rmsnorm", tie_head=False,
)  # fmt: skip
SIZES = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN3 = SIZES | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 5}
BERT = SIZES | {"architectures": ["BertModel"]}
BERT.pop("num_key_value_heads")
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def params():
    return tx.init_params(tx.build(SMALL), jax.random.key(0))


@pytest.fixture(scope="module")
def whole(params, tmp_path_factory):
    """What a directory of SMALL as a LLaMA holds: its config.json and its tensors."""
    root = tmp_path_factory.mktemp("whole")
    tx.save_pretrained(root, SMALL, params, architecture="LlamaForCausalLM")
    return json.loads((root / "config.json").read_text()), dict(open_safetensors(root).read())


def put(root, values, tensors, **how):
    save_safetensors(root, tensors.items(), **how)
    (root / "config.json").write_text(json.dumps(values))
    return root


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (LLAMA | {"architectures": ["MambaForCausalLM"]}, r"architectures=\['MambaForCausalLM'\], model_type="),
        ({"model_type": "mamba"}, "architectures=None, model_type='mamba'; those read are GPT2LMHeadModel, Llama"),
        ({}, "has architectures=None, model_type=None; those read are"),
        (LLAMA | {"architectures": 7}, "architectures=7"),
        (LLAMA | {"architectures": [["LlamaForCausalLM"]]}, "has architectures=.*; those read are"),
        (LLAMA | {"new_option": 3, "other": [1]}, r"new_option=3, other=\[1\] has no counterpart here; remove it"),
        (LLAMA | {"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not honoured"),
        (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder=True is not honoured"),
        (LLAMA | {"add_cross_attention": True}, "add_cross_attention=True is not honoured"),
        (LLAMA | {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not honoured; this family is read with"),
        (LLAMA | {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] is not honoured"),
        (LLAMA | {"attention_bias": 1}, "attention_bias=1 is not honoured"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not honoured"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope' is not honoured"),
        (LLAMA | {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic' is not honoured"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "x=1, which is not honoured for"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' must be a positive float"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling of 'linear' has no factor; fetch the file again"),
        (LLAMA | {"rope_scaling": []}, r"rope_scaling=\[\] must be an object"),
        (LLAMA | {"vocab_size": 2**70}, f"vocab_size={2**70} is more than a model has; fetch the file again"),
        (LLAMA | {"intermediate_size": None}, "intermediate_size=None must be a positive int"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        (LLAMA | {"rope_parameters": {"full_attention": {}}}, "full_attention={}, which is not honoured for 'default'"),
        (BERT | {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not honoured"),
        (QWEN3 | {"layer_types": ["full_attention"]}, "layer_types has .*; it must have one of each of the 2 layers"),
        (QWEN3 | {"layer_types": ["chunked_attention"] * 2}, "layer_types='chunked_attention' is not honoured"),
        (LLAMA | {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 must be from 1 to 1000"),
        (LLAMA | {"num_hidden_layers": "2"}, "num_hidden_layers='2' must be from 1"),
        (LLAMA | {"hidden_size": "8"}, "d_model='8' is str; it must be int"),
        (LLAMA | {"hidden_size": -8}, "d_model=-8 must be at least 1"),
        (LLAMA | {"num_attention_heads": 3}, "d_model=8 must be a multiple of n_heads=3"),
        (LLAMA | {"rms_norm_eps": math.nan}, "norm_eps=nan must be a finite number"),
        (LLAMA | {"rope_theta": math.inf}, "rope_theta=inf must be a positive float"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_honoured_is_refused_by_name(values, text, unhooked):
    with pytest.raises(InputError, match=text):
        read_family(values, "config.json")


DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE = ["x", None, True, -1, 0, 1.5, math.nan, math.inf, 10**12, 10**30, [1], DEEP, {"a": {"rope_type": [1]}}]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_hostile_values_are_refused_in_a_line_or_honoured(family, unhooked):
    keys = {key for field in family.fields for key in field.defaults} | {"architectures", "is_encoder_decoder"}
    lines = []
    for key in keys:
        for value in HOSTILE:
            try:
                read_family({"architectures": [family.architecture], key: value}, "config.json")
            except InputError as error:
                lines.append(str(error))
    assert not [line for line in lines if "\n" in line or len(line) > 700]


def test_code_in_a_config_is_passed_over(whole, params, tmp_path):
    values, tensors = whole
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}
    (tmp_path / "evil.py").write_text("raise SystemExit(3)")
    found = tx.load_pretrained(put(tmp_path, values | code, tensors))
    assert found.cfg == tx.load_pretrained(tmp_path).cfg
    same(found.params, params)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "config.json is not JSON"),
        (b"[" * 10**5, "config.json is not JSON"),
        (b"[1]", "config.json is not a JSON object; fetch it again"),
        (
            b"{" + b" " * 10**6 + b"}",
            "config.json has more than 1,000,000 bytes, as no such file has; fetch it again",
        ),
        (b'"\xff"', "config.json is not JSON"),
    ],
)
def test_a_config_that_is_no_json_object(content, text, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=text):
        tx.load_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*config.json \(No such file.*; give the directory of a model"):
        tx.load_pretrained(tmp_path)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


WRONG = {
    "missing": (lambda t: without(t, Q), rf"has no {Q}; {Q} would be \[8, 8\], our stack/blocks_0/attention/q/kernel"),
    "renamed": (
        lambda t: without(t, K) | {"k": t[K]},
        rf"has no {K}; {K} would be \[4, 8\], our stack/blocks_1/attention/k/kernel. It has k, which are not read",
    ),
    "extra": (lambda t: t | {"lora.a": t[K]}, r"has lora.a \[4, 8\], which this architecture does not have; remove it"),
    "shape": (lambda t: t | {K: t[K].T}, rf"{K} is \[8, 4\] in .*, and \[4, 8\] by its config; they do not belong"),
    "integers": (lambda t: t | {K: t[K].astype(np.int8)}, f"{K} in .* is int8; weights are float32, float16, "),
    "none": (lambda t: {K: t[K]}, "has 1 tensors, too few for 2 layers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_not_those_of_the_config(name, whole, tmp_path):
    change, text = WRONG[name]
    put(tmp_path, whole[0], change(whole[1]))
    with pytest.raises(InputError, match=text):
        tx.load_pretrained(tmp_path)


def test_buffers_and_repeated_tables_are_passed_over(whole, params, tmp_path):
    values, tensors = whole
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}
    same(tx.load_pretrained(put(tmp_path / "buffer", values, tensors | more)).params, params)
    table = tensors["model.embed_tokens.weight"]
    for name, head, tied in (("repeats", table, True), ("differs", tensors["lm_head.weight"], False)):
        found = tx.load_pretrained(put(tmp_path / name, values | {"tie_word_embeddings": True},
                                       tensors | {"lm_head.weight": head}))  # fmt: skip
        assert found.cfg.tie_head is tied
        assert ("head" in found.params) is not tied


def test_integer_buffers_of_older_files_are_passed_over(tmp_path):
    cfg = tx.ModelConfig(
        stack="encoder", vocab_size=11, max_len=32, d_model=8, n_layers=1, n_heads=2, norm_embeddings=True,
        n_token_types=2, positions="learned", biases="all", mlp="gelu", norm_order="post", pooler=True,
    )  # fmt: skip
    params = tx.init_params(tx.build(cfg), jax.random.key(0))
    tx.save_pretrained(tmp_path / "bare", cfg, params)
    values, tensors = (
        json.loads((tmp_path / "bare/config.json").read_text()),
        dict(open_safetensors(tmp_path / "bare").read()),
    )
    ids = {"embeddings.position_ids": np.arange(32)[None]}
    same(tx.load_pretrained(put(tmp_path / "ids", values, tensors | ids)).params, params)
    outer = {f"bert.{name}": tensor for name, tensor in (tensors | ids).items()}
    same(tx.load_pretrained(put(tmp_path / "outer", values, outer)).params, params)
    without_pooler = without(tensors, "pooler.dense.weight", "pooler.dense.bias")
    assert not tx.load_pretrained(put(tmp_path / "unpooled", values, without_pooler)).cfg.pooler


def test_the_file_of_a_bare_gpt2_leaves_its_prefix_out(tmp_path):
    cfg = tx.ModelConfig(vocab_size=11, max_len=9, d_model=8, n_layers=1, n_heads=2, positions="learned", biases="all")
    params = tx.init_params(tx.build(cfg), jax.random.key(0))
    assert tx.save_pretrained(tmp_path / "whole", cfg, params) == "GPT2LMHeadModel"
    tensors = dict(open_safetensors(tmp_path / "whole").read())
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 9, 9), np.float32))
    assert bare.keys() != tensors.keys()
    put(tmp_path / "bare", json.loads((tmp_path / "whole/config.json").read_text()), bare)
    same(tx.load_pretrained(tmp_path / "bare").params, params)


def test_a_tensor_under_two_names_is_refused(whole, tmp_path):
    values, tensors = whole
    put(tmp_path, values, tensors | {"norm.weight": tensors["model.norm.weight"] + 1})
    with pytest.raises(InputError, match=r"has norm.weight under two names, with and without a prefix; remove one"):
        tx.load_pretrained(tmp_path)


def test_parameters_of_another_model_are_not_written(params, tmp_path):
    norm = {"stack": params["stack"] | {"last_norm": {"scale": np.ones(7)}}}
    for other, text in (
        (without(params, "head"), "params has no head/map/kernel, which its config has; give those of this config, "),
        (params | {"more": {"kernel": np.ones(3)}}, "params has more/kernel, which its config has not; give the"),
        (params | norm, r"stack/last_norm/scale is \[7\] in params, and \[8\] by its config"),
    ):
        with pytest.raises(InputError, match=text):
            tx.save_pretrained(tmp_path / "new", SMALL, other)
    assert not [*tmp_path.iterdir()]


def test_special_ids_are_of_the_vocabulary(whole, tmp_path):
    values, tensors = whole
    put(tmp_path / "none", values | {"pad_token_id": -1, "eos_token_id": [2, 10]}, tensors)
    assert tx.load_pretrained(tmp_path / "none").special_ids == {"eos_token_id": [2, 10]}
    for wrong in (11, "2", [2, True]):
        root = put(tmp_path / f"{wrong}", values | {"eos_token_id": wrong}, tensors)
        with pytest.raises(InputError, match=r"eos_token_id=.* must be an id, or a list of ids, from 0 to 10; mend it"):
            tx.load_pretrained(root)


def test_a_path_is_no_name():
    with pytest.raises(InputError, match=r"^model 'smollm2' does not exist; give a name \("):
        tx.load_pretrained(pathlib.Path("smollm2"))


def test_a_config_of_many_layers_is_refused_at_once(whole, tmp_path):
    types = ["sliding_attention"] * 999 + ["full_attention"]
    started = time.process_time()
    _, cfg = read_family(QWEN3 | {"num_hidden_layers": 1000, "layer_types": types}, "config.json")
    assert cfg.window_pattern == "w" * 999 + "f"
    empty = {f"{i}": np.ones((0,), np.float32) for i in range(3000)}
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "n_layer": 3000, "n_embd": 8, "n_head": 2}
    with pytest.raises(InputError, match="has 3000 layers, more than 1000"):
        tx.load_pretrained(put(tmp_path, gpt2, empty))
    assert time.process_time() - started < 1


def test_t5_v11_has_a_head_of_its_own(tmp_path):
    cfg = tx.ModelConfig(
        stack="encoder_decoder", vocab_size=11, max_len=32, d_model=8, n_layers=1, n_heads=2, positions="t5",
        attention_scale=1.0, norm="rmsnorm", mlp="geglu_tanh", tie_head=False,
    )  # fmt: skip
    params = tx.init_params(tx.build(cfg), jax.random.key(0))
    assert tx.save_pretrained(tmp_path, cfg, params) == "T5ForConditionalGeneration"
    found = tx.load_pretrained(tmp_path)
    assert (found.cfg.tie_head, found.cfg.scale_head) == (False, False)
    same(found.params, params)


def test_shards(whole, params, tmp_path):
    put(tmp_path, *whole, max_shard_bytes=500)
    assert (tmp_path / INDEX).exists()
    same(tx.load_pretrained(tmp_path).params, params)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes(stored, params, tmp_path):
    tx.save_pretrained(tmp_path, SMALL, params, architecture="LlamaForCausalLM", dtype=stored)
    assert set(open_safetensors(tmp_path).dtypes.values()) == {stored}
    for wanted in (None, "bfloat16", "float16", "float32"):
        leaves = jax.tree.leaves(tx.load_pretrained(tmp_path, dtype=wanted).params)
        assert {str(leaf.dtype) for leaf in leaves} == {wanted or stored}
    exact = jax.tree.map(lambda leaf: np.asarray(leaf.astype(stored).astype(np.float32)), params)
    same(tx.load_pretrained(tmp_path).params, exact)
    large = jax.tree.map(lambda leaf: leaf + 1e5, params)
    with pytest.raises(InputError, match=r"holds 1e\+05, beyond float16's 65504; use dtype bfloat16 or float32"):
        tx.save_pretrained(tmp_path / "large", SMALL, large, architecture="LlamaForCausalLM", dtype="float16")
    with pytest.raises(InputError, match="dtype='int8' is not one of float32, bfloat16, float16, or None, as stored"):
        tx.load_pretrained(tmp_path, dtype="int8")
