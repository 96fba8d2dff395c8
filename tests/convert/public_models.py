"""Tiny models of every family with random weights, made by transformers: the oracle of the importer."""

import functools

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

V = 37
SIZES = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": V, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 96, "bos_token_id": 1, "eos_token_id": 2
}  # fmt: skip
T5 = {"vocab_size": V, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
BART = {
    "vocab_size": V, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 96,
    "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-relu": ("GPT2LMHeadModel", GPT2 | {"activation_function": "relu", "n_inner": 31}),
    "llama": ("LlamaForCausalLM", SIZES),
    "llama2": ("LlamaForCausalLM", GROUPED | {"head_dim": 10, "tie_word_embeddings": True}),
    "llama3": ("LlamaForCausalLM", GROUPED | {"rope_parameters": LLAMA3, "attention_bias": True}),
    "llama-linear": ("LlamaForCausalLM", GROUPED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4,
    "factor": 2.0}, "mlp_bias": True}),
    "llama-yarn": ("LlamaForCausalLM", GROUPED | {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    "smollm": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default",
    "rope_theta": 1e5}}),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 5}),
    "mixtral": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 8}),
    "mixtral-window": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4, "sliding_window": 5, "head_dim": 6}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen2-window": ("Qwen2ForCausalLM", GROUPED | {"use_sliding_window": True, "sliding_window": 5,
    "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 8, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "rope_parameters": GEMMA3_ROPE}),
    "phi3": ("Phi3ForCausalLM", GROUPED | {"sliding_window": 6}),
    "phi4": ("Phi3ForCausalLM", GROUPED | {"hidden_size": 32, "rope_parameters": {"rope_type": "default",
    "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    "pythia": ("GPTNeoXForCausalLM", SIZES | {"hidden_size": 32, "rope_parameters": {"rope_type": "default",
    "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "neox-serial": ("GPTNeoXForCausalLM", SIZES | {"use_parallel_residual": False, "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    "starcoder2": ("Starcoder2ForCausalLM", GROUPED | {"sliding_window": 7}),
}  # fmt: skip
TRANSLATORS = {
    "t5": ("T5ForConditionalGeneration", T5),
    "flan-t5": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", BART),
    "marian": ("MarianMTModel", BART | {"scale_embedding": True, "activation_function": "swish"}),
}
ENCODERS = {
    "bert": ("BertModel", SIZES),
    "bert-mlm": ("BertForMaskedLM", SIZES),
    "roberta": ("RobertaModel", SIZES | {"type_vocab_size": 1, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaModel", SIZES | {"type_vocab_size": 1, "pad_token_id": 1}),
    "xlm-roberta-mlm": ("XLMRobertaForMaskedLM", SIZES | {"type_vocab_size": 1, "pad_token_id": 1}),
    "roberta-mlm": ("RobertaForMaskedLM", SIZES | {"type_vocab_size": 1, "pad_token_id": 1}),
}
ALL = DECODERS | TRANSLATORS | ENCODERS
WIDE = GROUPED | {"hidden_size": 32, "intermediate_size": 64}  # multiples of 32, the block of Q8_0
GEMMA = WIDE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}  # a scale that no key says
LLAMA31 = LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}
GGUF = {  # models that llama.cpp's format can hold
    "gguf llama": ("LlamaForCausalLM", WIDE | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gguf llama2": ("LlamaForCausalLM", WIDE | {"head_dim": 16}),
    "gguf llama3.1": ("LlamaForCausalLM", WIDE | {"head_dim": 16, "rope_parameters": LLAMA31}),
    "gguf llama3.2": ("LlamaForCausalLM", WIDE | {"head_dim": 16, "rope_parameters": LLAMA31 | {"factor": 32.0}}),
    "gguf llama-linear": ("LlamaForCausalLM", WIDE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3,
    "factor": 2.0}}),
    "gguf llama-yarn": ("LlamaForCausalLM", WIDE | {"rope_parameters": YARN}),
    "gguf qwen2": ("Qwen2ForCausalLM", WIDE | {"tie_word_embeddings": True}),
    "gguf qwen3": ("Qwen3ForCausalLM", WIDE | {"head_dim": 16}),
    "gguf gemma": ("GemmaForCausalLM", GEMMA),
    "gguf gemma2": ("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gguf gemma3": ("Gemma3ForCausalLM", GEMMA | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE}),
}  # fmt: skip


@functools.cache
def make(name: str):
    """A model of the family, each of its parameters random."""
    architecture, options = (ALL | GGUF)[name]
    torch.manual_seed(len(name))
    kind = getattr(hf, architecture)
    model = kind(kind.config_class(**options)).eval()
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            if "embed_positions" not in path or name == "bart":
                leaf.normal_(float(leaf.ndim == 1 and "bias" not in path and "gemma" not in name), 0.15)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0, 0.3)
    return model
