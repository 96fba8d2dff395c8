"""The families that come as GGUF, as data: what llama.cpp's metadata says, and what its tensors are called here.

Sources: llama.cpp's gguf-py constants for keys and names, its llama-model.cpp for what no key says.
"""

from typing import Any

import numpy as np

from tx_jax.config import ModelConfig, RotaryConfig
from tx_jax.convert.family import Family, blocks
from tx_jax.convert.fields import Field, Values, copy, number, one_of, only
from tx_jax.convert.mapping import Table
from tx_jax.errors import InputError
from tx_jax.ops.positions import llama3_frequencies, rotary_frequencies

SCALINGS = {None: "none", "none": "none", "linear": "linear", "yarn": "yarn"}


def _reads(keys: dict[str, Any], read: Any) -> Field:
    """A field of files that are only read."""
    return Field(keys, read, lambda cfg: {})


def _rope(window_base: float | None = None) -> Field:
    """Rotary positions; window_base: θ of layers that see a window, where the file has none."""
    keys = {
        "rope.freq_base": 10_000.0, "rope.dimension_count": None, "rope.scaling.type": None, "rope.scaling.factor": 1.0,
        "rope.scaling.original_context_length": None, "rope.scaling.finetuned": None, "context_length": None,
        "attention.key_length": None, "embedding_length": None, "attention.head_count": None,
    }  # fmt: skip
    local_key = "rope.freq_base_swa"
    keys |= {} if window_base is None else {local_key: window_base}

    def read(v: Values) -> dict[str, Any]:
        kind = SCALINGS[one_of("rope.scaling.type", v["rope.scaling.type"], *SCALINGS)]
        if v["rope.scaling.type"] is None and v["rope.scaling.factor"] != 1:
            kind = "linear"  # as llama.cpp takes it
        heads, width = (number(key, v[key]) for key in ("attention.head_count", "embedding_length"))
        H = number("attention.key_length", v["attention.key_length"] or width // heads)
        turned = number("rope.dimension_count", v["rope.dimension_count"] or H)
        long = v["rope.scaling.original_context_length"] or v["context_length"]
        rotary = {"base": number("rope.freq_base", v["rope.freq_base"], float), "fraction": turned / H}
        if kind != "none":
            rotary |= {"scaling": kind, "factor": number("rope.scaling.factor", v["rope.scaling.factor"], float)}
            rotary |= {"original_len": number("context_length", long)}
        rotary |= {} if window_base is None else {"window_base": number(local_key, v[local_key], float)}
        return {"rotary": RotaryConfig(**rotary), "d_head": H}

    return _reads(keys, read)


def _window(pattern: str, default: int | None = None) -> Field:
    """No key says which layers see the window."""
    key = "attention.sliding_window"
    return _reads({key: default}, lambda v: {"window": v[key] or None, "window_pattern": pattern})


def _gemma_scale(large: int) -> Field:
    """Scores × 1/√d_head, but in the model of `large` layers, 27B, × 1/√(d_model / n_heads). No key says so."""

    def read(v: Values) -> dict[str, Any]:
        if v["block_count"] != large:
            return {}
        width, heads = (
            number("embedding_length", v["embedding_length"]),
            number("head_count", v["attention.head_count"]),
        )
        return {"attention_scale": (width / heads) ** -0.5}

    return _reads({"block_count": None, "embedding_length": None, "attention.head_count": None}, read)


def _head_cap(default: float | None) -> Field:
    return copy("final_logit_softcapping", "head_soft_cap", default)


def _heads() -> Field:
    key, all_heads = "attention.head_count_kv", "attention.head_count"
    return _reads({key: None, all_heads: None}, lambda v: {"n_kv_heads": v[key] or v[all_heads]})


def _one_width() -> Field:
    keys = "attention.key_length", "attention.value_length"

    def read(v: Values) -> dict[str, Any]:
        one_of(keys[1], v[keys[1]], v[keys[0]])
        return {}

    return _reads(dict.fromkeys(keys), read)


SIZES = (
    copy("vocab_size", "vocab_size", None), copy("context_length", "max_len", None),
    copy("embedding_length", "d_model", None), copy("block_count", "n_layers", None),
    copy("attention.head_count", "n_heads", None), _heads(), _one_width(),
    copy("feed_forward_length", "d_mlp", None), copy("attention.layer_norm_rms_epsilon", "norm_eps", 1e-6),
    only("expert_count", None, 0), only("expert_used_count", None, 0), only("attention.causal", None, True),
)  # fmt: skip
ATTENTION_CAP = copy("attn_logit_softcapping", "attention_soft_cap", 50.0)
BASE = {"positions": "rotary", "norm": "rmsnorm", "norm_order": "pre", "mlp": "swiglu", "tie_head": False}
GEMMA = BASE | {"mlp": "geglu_tanh", "scale_embeddings": True, "norm": "rmsnorm_offset"}
TIED = {"output.weight": {"tie_head": True}}


def _table(q_and_k: str, norm: str) -> Table:
    """llama.cpp's names; q_and_k and norm are layouts."""
    block = {
        "attn_norm": f"attention_norm{norm}",
        "attn_q": f"attention/q{q_and_k}",
        "attn_k": f"attention/k{q_and_k}",
        "attn_v": "attention/v",
        "attn_output": "attention/out",
        "attn_q_norm": f"attention/q_norm{norm}",
        "attn_k_norm": f"attention/k_norm{norm}",
        "ffn_norm": f"mlp_norm{norm}",
        "ffn_gate": "mlp/gate",
        "ffn_up": "mlp/up",
        "ffn_down": "mlp/down",
        "post_attention_norm": f"attention_out_norm{norm}",
        "post_ffw_norm": f"mlp_out_norm{norm}",
    }
    ends = {"token_embd.weight": "embed/table", "output_norm": f"stack/last_norm{norm}", "output": "head/map"}
    return ends | blocks(block, "blk.{i}.", "stack/blocks_{i}/")


def _family(name: str, architecture: str, base: dict[str, Any], *fields: Field) -> Family:
    q_and_k, norm = " pairs" * (name == "llama"), " one_more" * name.startswith("gemma")
    table, fields = _table(q_and_k, norm), (*SIZES, *fields)
    return Family(architecture, name, base, fields, table, head="output.weight", unused=ROPE_FREQS, absent=TIED)


ROPE_FREQS = "rope_freqs.weight"  # what llama3's scaling divides each frequency by
GGUF_FAMILIES = {
    family.model_type: family
    for family in (
        _family("llama", "LlamaForCausalLM", BASE, _rope(), _window("w")),
        _family("qwen2", "Qwen2ForCausalLM", BASE | {"biases": "qkv"}, _rope()),
        _family("qwen3", "Qwen3ForCausalLM", BASE | {"qk_norm": True}, _rope()),
        _family("gemma", "GemmaForCausalLM", GEMMA, _rope()),
        _family(
            "gemma2", "Gemma2ForCausalLM", GEMMA | {"norm_order": "sandwich"},
            _rope(), _window("wf", 4096), ATTENTION_CAP, _head_cap(30.0), _gemma_scale(46),
        ),
        _family(
            "gemma3", "Gemma3ForCausalLM", GEMMA | {"norm_order": "sandwich", "qk_norm": True},
            _rope(10_000.0), _window("wwwwwf"), _head_cap(None), _gemma_scale(62),
        ),
    )
}  # fmt: skip


def with_rope_freqs(cfg: ModelConfig, divisors: np.ndarray) -> ModelConfig:
    """The config whose frequencies are divided by these: Llama 3.1's and 3.2's are known.

    Raises:
        InputError: they are not.
    """
    plain, alone = rotary_frequencies(cfg.H, cfg.rotary.base), cfg.rotary == RotaryConfig(base=cfg.rotary.base)
    for factor in (8.0, 32.0):
        scaled = llama3_frequencies(cfg.H, cfg.rotary.base, factor, 8192, 1.0, 4.0)
        if alone and divisors.shape == plain.shape and np.allclose(plain / scaled, divisors, rtol=1e-4):
            rotary = RotaryConfig(base=cfg.rotary.base, scaling="llama3", factor=factor, original_len=8192)
            return ModelConfig(**{**vars(cfg), "rotary": rotary})
    raise InputError(f"{ROPE_FREQS} {divisors.tolist()!s:.80} is not that of Llama 3.1 or 3.2; it is not honoured")


def gguf_values(metadata: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family that GGUF metadata names, and what they say of the model, by key.

    Raises:
        InputError: the architecture is unknown, or the file is one of several.
    """
    name = metadata.get("general.architecture")
    known = ", ".join(GGUF_FAMILIES)
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        raise InputError(f"general.architecture={name!r:.80} is not one of those read, {known}")
    one_of("split.count", metadata.get("split.count"), None, 0, 1)
    values = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    tokens = metadata.get("tokenizer.ggml.tokens")
    return GGUF_FAMILIES[name], ({"vocab_size": len(tokens)} if isinstance(tokens, list) else {}) | values
