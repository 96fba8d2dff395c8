"""Models as GGUF, written as llama.cpp's converter writes them: the logits of transformers; and refusals by name."""

import copy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
import gguf  # noqa: E402
import public_models as public  # noqa: E402
from gguf import GGMLQuantizationType as Kind  # noqa: E402

import tx_jax as tx  # noqa: E402
from tx_jax.errors import InputError  # noqa: E402

T, LENGTHS = 14, (14, 9)
TOKENS = np.random.default_rng(1).integers(3, public.V, (2, T)).astype(np.int32)
POSITIONS = np.where(np.arange(T) < np.array(LENGTHS)[:, None], np.arange(T), -1).astype(np.int32)
REAL = POSITIONS >= 0
QUICK = {"xla_backend_optimization_level": 0}


def permuted(weight, n_heads):
    """Source: llama.cpp, conversion/llama.py, LlamaModel.permute."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def rope_factors(config):
    """Source: llama.cpp, conversion/llama.py, LlamaModel.generate_extra_tensors."""
    rope, dim = config.rope_parameters, config.head_dim
    old, low, high = 8192, rope["low_freq_factor"], rope["high_freq_factor"]
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim):
        length, smooth = 2 * np.pi / frequency, (old * frequency / (2 * np.pi) - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        yield 1 if length < old / high else rope["factor"] if length > old / low else between


def metadata(config, arch):
    """What the converter writes, by key."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    heads = config.num_attention_heads
    found = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }  # fmt: skip
    if "head_dim" in config.to_dict() and config.head_dim != config.hidden_size // heads:
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if arch == "llama":
        found["rope.dimension_count"] = getattr(config, "head_dim", None) or config.hidden_size // heads
        found["vocab_size"] = config.vocab_size
    if arch not in ("gemma", "gemma2"):
        found["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if arch in ("gemma2", "gemma3"):
        found["attention.sliding_window"] = config.sliding_window
    if arch == "gemma3":
        found["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if arch == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    return {f"{arch}.{key}": value for key, value in found.items()} | {
        "tokenizer.ggml.tokens": [str(i) for i in range(config.vocab_size)],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip


def tensors(model, arch):
    """The model's parameters under llama.cpp's names, as it holds them."""
    config = model.config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        if arch == "llama" and ".q_proj." in name:
            array = permuted(array, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            array = permuted(array, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        yield names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array)
    if arch == "llama" and config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", np.array([*rope_factors(config)], np.float32)


def write(path, arch, fields, arrays, kind=Kind.F32):
    """A file by gguf's own writer, matrices in `kind`; a field of None is left out."""
    writer = gguf.GGUFWriter(path, arch)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        if value is not None:
            kinds.get(type(value), writer.add_array)(key, value)
    for name, array in arrays:
        one = kind if array.ndim == 2 else Kind.F32
        writer.add_tensor(name, gguf.quantize(array, one), raw_dtype=one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def arch_of(name):
    return {"gemma3_text": "gemma3"}.get(*[public.make(name).config.model_type] * 2)


def written(path, name, kind=Kind.F32, arrays=None, **changes):
    """The public model of this name as a GGUF file, its metadata changed."""
    model, arch = public.make(name), arch_of(name)
    fields = metadata(model.config, arch) | {key.replace("__", "."): value for key, value in changes.items()}
    return write(path, arch, fields, tensors(model, arch) if arrays is None else arrays, kind)


def theirs(model):
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(TOKENS).long(), "attention_mask": torch.tensor(REAL).long()}
        return model(**inputs).logits.numpy()


def compare(found, wanted):
    apply = jax.jit(tx.build(found.cfg).apply, compiler_options=QUICK)
    got = np.asarray(apply({"params": found.params}, jnp.asarray(TOKENS), jnp.asarray(POSITIONS))[0])
    np.testing.assert_allclose(got[REAL], wanted[REAL], rtol=0, atol=1e-4)
    assert np.abs(wanted[REAL]).max() > 0.1, "logits too small to tell anything"


@pytest.mark.parametrize("name", public.GGUF)
def test_logits(name, tmp_path):
    found = tx.load_pretrained(written(tmp_path / "model.gguf", name))
    compare(found, theirs(public.make(name)))
    assert found.architecture == public.GGUF[name][0]
    assert found.special_ids == {"bos_token_id": 1, "eos_token_id": 2}
    assert found.cfg.tie_head == public.make(name).config.tie_word_embeddings


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0])
def test_logits_of_fewer_bits(kind, tmp_path):
    path = written(tmp_path / "model.gguf", "gguf llama2", kind)
    model = copy.deepcopy(public.make("gguf llama2"))
    with torch.no_grad():
        for leaf in (leaf for leaf in model.parameters() if leaf.ndim == 2):
            raw = gguf.quantize(leaf.numpy(), kind)
            leaf.copy_(torch.tensor(gguf.dequantize(raw, kind).reshape(leaf.shape)))
    compare(tx.load_pretrained(path), theirs(model))


def test_a_factor_without_a_type_is_linear(tmp_path):
    path = written(tmp_path / "model.gguf", "gguf llama2", llama__rope__scaling__factor=4.0)
    assert tx.load_pretrained(path).cfg.rotary == tx.RotaryConfig(scaling="linear", factor=4.0, original_len=96)


def test_older_files_of_gemma2_leave_its_caps_and_window_out(tmp_path):
    absent = ("attn_logit_softcapping", "final_logit_softcapping", "attention__sliding_window")
    path = written(tmp_path / "model.gguf", "gguf gemma2", **{f"gemma2__{key}": None for key in absent})
    cfg = tx.load_pretrained(path).cfg
    assert (cfg.attention_soft_cap, cfg.head_soft_cap, cfg.window, cfg.window_pattern) == (50.0, 30.0, 4096, "wf")


def test_older_files_of_gemma3_leave_the_base_of_its_window_out(tmp_path):
    path = written(tmp_path / "model.gguf", "gguf gemma3", gemma3__rope__freq_base_swa=None)
    assert tx.load_pretrained(path).cfg.rotary.window_base == 10_000.0


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("gguf llama", {"llama__expert_count": 8}, "expert_count=8 is not honoured"),
        (
            "gguf llama",
            {"llama__rope__scaling__attn_factor": 2.0},
            "rope.scaling.attn_factor=2.0 has no counterpart here",
        ),
        ("gguf llama", {"llama__rope__scaling__type": "longrope"}, "rope.scaling.type='longrope' is not honoured"),
        ("gguf llama", {"llama__attention__causal": False}, "attention.causal=False is not honoured"),
        ("gguf llama2", {"llama__attention__value_length": 8}, "attention.value_length=8 is not honoured"),
        ("gguf llama", {"llama__attention__head_count": None}, "attention.head_count=None must be a positive int"),
        ("gguf llama", {"llama__attention__head_count": "4"}, "attention.head_count='4' must be a positive int"),
        (
            "gguf llama",
            {"llama__attention__head_count_kv": [4, 2, 4]},
            r"n_kv_heads=\[4, 2, 4\] is list; it must be int",
        ),
        ("gguf llama", {"llama__feed_forward_length": [64, 32, 64]}, r"d_mlp=\[64, 32, 64\] is list; it must be int"),
        ("gguf llama", {"split__count": 3}, "split.count=3 is not honoured"),
    ],
)
def test_refuses_what_is_not_honoured_by_its_name(name, changes, text, unhooked, tmp_path):
    path = written(tmp_path / "model.gguf", name, **changes)
    with pytest.raises(InputError, match=text):
        tx.load_pretrained(path)


def test_refuses_another_architecture(tmp_path):
    path = write(tmp_path / "model.gguf", "mamba", {}, [("w", np.ones(3, np.float32))])
    with pytest.raises(InputError, match=r"general.architecture='mamba' is not one of those read, llama, qwen2, "):
        tx.load_pretrained(path)


def test_refuses_other_tensors(tmp_path):
    arrays = dict(tensors(public.make("gguf llama2"), "llama"))
    experts = {f"blk.{i}.ffn_gate_inp.weight": np.ones((4, 32), np.float32) for i in range(3)}
    freqs = {"rope_freqs.weight": np.linspace(1, 2, 8, dtype=np.float32)}
    for name, more, text in (
        ("more", arrays | experts, r"blk.0.ffn_gate_inp.weight, .* \[4, 32\], which this architecture does not have"),
        ("fewer", {name: array for name, array in arrays.items() if name != "blk.1.attn_v.weight"},
         r"has no blk.1.attn_v.weight; blk.1.attn_v.weight would be \[32, 32\], our stack/blocks_1/attention/v/kernel"),
        ("freqs", arrays | freqs, r"rope_freqs.weight \[1.0, 1.14.* is not that of Llama 3.1 or 3.2"),
    ):  # fmt: skip
        path = written(tmp_path / name, "gguf llama2", arrays=more.items())
        with pytest.raises(InputError, match=text):
            tx.load_pretrained(path)
