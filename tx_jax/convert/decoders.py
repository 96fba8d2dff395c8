"""Decoder-only families as data: GPT-2, LLaMA and what descends from it, GPT-NeoX."""

from tx_jax.convert.family import (
    GELUS,
    Family,
    attention_bias,
    blocks,
    eps,
    experts,
    head_dim,
    kv_heads,
    query_scalar,
    sizes,
    tied,
)
from tx_jax.convert.fields import Field, alias, choice, copy, only, rope, window
from tx_jax.convert.mapping import Table

RMS_BIASES = {(False, False): "none", (True, False): "attention", (False, True): "mlp", (True, True): "all"}
GATED = choice(
    "hidden_act",
    "mlp",
    {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"},
    "silu",
)
GEGLU = choice("hidden_activation", "mlp", {"gelu_pytorch_tanh": "geglu_tanh"}, "gelu_pytorch_tanh")
LLAMA_BASE = {"positions": "rotary", "norm": "rmsnorm", "norm_order": "pre"}
LLAMA_UNUSED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


LLAMA_BLOCK: Table = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention/q",
    "self_attn.k_proj": "attention/k",
    "self_attn.v_proj": "attention/v",
    "self_attn.o_proj": "attention/out",
    "self_attn.q_norm": "attention/q_norm",
    "self_attn.k_norm": "attention/k_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}
LLAMA_ENDS: Table = {"model.embed_tokens.weight": "embed/table", "model.norm": "stack/last_norm", "lm_head": "head/map"}


def _llama(**changes: str) -> Table:
    """LLaMA's table; a change replaces or adds a module of a layer, or removes it by the target ''."""
    block = {name.replace("__", "."): target for name, target in changes.items()}
    block = {name: target for name, target in (LLAMA_BLOCK | block).items() if target}
    return LLAMA_ENDS | blocks(block, "model.layers.{i}.", "stack/blocks_{i}/")


GEMMA_BASE = LLAMA_BASE | {"norm": "rmsnorm_offset", "scale_embeddings": True}
SANDWICH = {
    "post_attention_layernorm": "attention_out_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}
ONE_WAY = only("use_bidirectional_attention", None, False)


def _gemma_caps(attention: float | None, head: float | None) -> tuple[Field, Field]:
    caps = copy("attn_logit_softcapping", "attention_soft_cap", attention)
    return caps, copy("final_logit_softcapping", "head_soft_cap", head)


DECODERS = (
    Family(
        "GPT2LMHeadModel", "gpt2",
        {"positions": "learned", "norm": "layernorm", "norm_order": "pre", "biases": "all"},
        (
            copy("vocab_size", "vocab_size", 50_257), copy("n_positions", "max_len", 1024),
            copy("n_embd", "d_model", 768), copy("n_layer", "n_layers", 12), copy("n_head", "n_heads", 12),
            copy("n_inner", "d_mlp", None), choice("activation_function", "mlp", GELUS, "gelu_new"),
            eps(1e-5, "layer_norm_epsilon"), tied(True),
            only("scale_attn_weights", True), only("scale_attn_by_inverse_layer_idx", False),
            only("reorder_and_upcast_attn", False),
        ),
        {"transformer.wte.weight": "embed/table", "transformer.wpe.weight": "stack/positions/table",
         "transformer.ln_f": "stack/last_norm", "lm_head": "head/map"}
        | blocks(
            {
                "ln_1": "attention_norm",
                "attn.c_attn": "attention/q+k+v transposed",
                "attn.c_proj": "attention/out transposed",
                "ln_2": "mlp_norm",
                "mlp.c_fc": "mlp/up transposed",
                "mlp.c_proj": "mlp/down transposed",
            },
            "transformer.h.{i}.", "stack/blocks_{i}/",
        ),
        prefix="transformer.", unused=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    ),
    Family(
        "LlamaForCausalLM", "llama", LLAMA_BASE,
        (
            *sizes(32_000, 4096, 11_008, 32, 32, 2048), kv_heads(None), head_dim(None), GATED, eps(1e-6),
            tied(False), rope(), attention_bias(RMS_BIASES, "mlp_bias"),
            only("is_llama_config", None, True), only("rope_interleaved", None, False),
        ),
        _llama(), prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "MistralForCausalLM", "mistral", LLAMA_BASE,
        (
            *sizes(32_000, 4096, 14_336, 32, 32, 131_072), kv_heads(8), head_dim(None), GATED, eps(1e-6),
            tied(False), rope(), window(4096),
        ),
        _llama(), prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "MixtralForCausalLM", "mixtral", LLAMA_BASE,
        (
            *sizes(32_000, 4096, 14_336, 32, 32, 131_072), kv_heads(8), head_dim(None), GATED, eps(1e-5),
            tied(False), rope(1e6), window(None), *experts(8, 2),
        ),
        _llama(mlp__gate_proj="", mlp__up_proj="", mlp__down_proj="")
        | blocks(
            {
                "block_sparse_moe.gate": "mlp/router",
                "block_sparse_moe.experts.{e}.w1": "mlp/experts/gate",
                "block_sparse_moe.experts.{e}.w3": "mlp/experts/up",
                "block_sparse_moe.experts.{e}.w2": "mlp/experts/down",
            },
            "model.layers.{i}.", "stack/blocks_{i}/",
        ),
        prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "Qwen2ForCausalLM", "qwen2", LLAMA_BASE | {"biases": "qkv"},
        (
            *sizes(151_936, 4096, 22_016, 32, 32, 32_768), kv_heads(32), GATED, eps(1e-6),
            tied(False), rope(), window(4096, switch=True), only("use_mrope", None, False),
        ),
        _llama(), prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "Qwen3ForCausalLM", "qwen3", LLAMA_BASE | {"qk_norm": True},
        (
            *sizes(151_936, 4096, 22_016, 32, 32, 32_768), kv_heads(32), head_dim(128), GATED, eps(1e-6),
            tied(False), rope(), window(4096, switch=True), attention_bias(RMS_BIASES),
        ),
        _llama(), prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "GemmaForCausalLM", "gemma", GEMMA_BASE,
        (
            *sizes(256_000, 3072, 24_576, 28, 16, 8192), kv_heads(16), head_dim(256),
            choice("hidden_act", "mlp", {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"}, "gelu_pytorch_tanh"),
            only("hidden_activation", None, "gelu_pytorch_tanh", "gelu"), eps(1e-6), tied(True), rope(),
            attention_bias(RMS_BIASES), ONE_WAY,
        ),
        _llama(), prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "Gemma2ForCausalLM", "gemma2", GEMMA_BASE | {"norm_order": "sandwich"},
        (
            *sizes(256_000, 2304, 9216, 26, 8, 8192), kv_heads(4), head_dim(256),
            GEGLU, alias("hidden_act", "hidden_activation", "gelu_pytorch_tanh"), eps(1e-6), tied(True), rope(),
            window(4096, every=2),
            alias("sliding_window_size", "sliding_window", 4096),
            attention_bias(RMS_BIASES), query_scalar(256), *_gemma_caps(50.0, 30.0), ONE_WAY,
        ),
        _llama(**SANDWICH), prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "Gemma3ForCausalLM", "gemma3_text", GEMMA_BASE | {"norm_order": "sandwich", "qk_norm": True},
        (
            *sizes(262_208, 2304, 9216, 26, 8, 131_072), kv_heads(4), head_dim(256),
            GEGLU, alias("hidden_act", "hidden_activation", "gelu_pytorch_tanh"), eps(1e-6), tied(True), rope(1e6,
            window_theta=1e4), window(4096, every=6, every_key="sliding_window_pattern"),
            attention_bias(RMS_BIASES), query_scalar(256), *_gemma_caps(None, None), ONE_WAY,
        ),
        _llama(**SANDWICH), prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "Phi3ForCausalLM", "phi3", LLAMA_BASE,
        (
            *sizes(32_064, 3072, 8192, 32, 32, 4096), kv_heads(None), GATED, eps(1e-5),
            tied(False), rope(fraction=1.0), window(None),
            only("attention_bias", False),
            Field({"original_max_position_embeddings": None}, lambda v: {}, lambda cfg: {}),  # of longrope alone
        ),
        _llama(
            self_attn__q_proj="", self_attn__k_proj="", self_attn__v_proj="", mlp__gate_proj="", mlp__up_proj="",
            self_attn__qkv_proj="attention/q+k+v", mlp__gate_up_proj="mlp/gate+up",
        ),
        prefix="model.", unused=LLAMA_UNUSED,
    ),
    Family(
        "GPTNeoXForCausalLM", "gpt_neox", {"positions": "rotary", "norm": "layernorm", "norm_order": "pre"},
        (
            *sizes(50_432, 6144, 24_576, 44, 64, 2048), choice("hidden_act", "mlp", GELUS, "gelu"),
            eps(1e-5, "layer_norm_eps"), tied(False), copy("use_parallel_residual", "parallel", True),
            rope(theta_key="rotary_emb_base", fraction=0.25, fraction_key="rotary_pct"),
            alias("rope_theta", "rotary_emb_base", 10_000), alias("partial_rotary_factor", "rotary_pct", 0.25),
            attention_bias({(True, False): "all", (False, False): "mlp"}, default=True),
        ),
        {"gpt_neox.embed_in.weight": "embed/table", "gpt_neox.final_layer_norm": "stack/last_norm",
        "embed_out": "head/map"}
        | blocks(
            {
                "input_layernorm": "attention_norm",
                "attention.query_key_value": "attention/q+k+v heads",
                "attention.dense": "attention/out",
                "post_attention_layernorm": "mlp_norm",
                "mlp.dense_h_to_4h": "mlp/up",
                "mlp.dense_4h_to_h": "mlp/down",
            },
            "gpt_neox.layers.{i}.", "stack/blocks_{i}/",
        ),
        prefix="gpt_neox.", head="embed_out.weight",
        unused=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
    Family(
        "Starcoder2ForCausalLM", "starcoder2", {"positions": "rotary", "norm": "layernorm", "norm_order": "pre"},
        (
            *sizes(49_152, 3072, 12_288, 30, 24, 4096), kv_heads(2), choice("hidden_act", "mlp", GELUS,
            "gelu_pytorch_tanh"),
            eps(1e-5, "norm_epsilon"), tied(True), rope(), window(None), only("mlp_type", "default"),
            only("norm_type", "layer_norm"), choice("use_bias", "biases", {True: "all", False: "norm"}, True),
        ),
        _llama(mlp__gate_proj="", mlp__up_proj="", mlp__down_proj="", mlp__c_fc="mlp/up", mlp__c_proj="mlp/down"),
        prefix="model.", unused=LLAMA_UNUSED,
    ),
)  # fmt: skip
