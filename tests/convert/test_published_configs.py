"""config.json as publishers wrote it, with the keys that no class of transformers has, and the parameters it makes.

The values are facts of the models' public files; each count is what the publisher's own weights hold.
"""

import pytest

import tx_jax as tx
from tx_jax.convert.pretrained import read_family

OLD = {"_commit_hash": None, "transformers_version": "4.40.1", "torch_dtype": "bfloat16", "use_cache": True}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
}  # fmt: skip
BART = {
    "model_type": "bart", "activation_dropout": 0.1, "activation_function": "gelu", "add_bias_logits": False,
    "add_final_layer_norm": False, "attention_dropout": 0.1, "classif_dropout": 0.1, "decoder_layerdrop": 0.0,
    "is_encoder_decoder": True, "init_std": 0.02, "normalize_before": False, "normalize_embedding": True,
    "num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 3, "gradient_checkpointing": False,
    "forced_eos_token_id": 2, "decoder_start_token_id": 2, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
    "task_specific_params": {"summarization": {"length_penalty": 1.0}}, "scale_embedding": False,
}  # fmt: skip
PUBLISHED = {
    "openai-community/gpt2": (124_439_808, {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100_000, "vocab_size": 49152, "pad_token_id": 2,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    }),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, LLAMA | {
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131_072,
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 500_000.0,
        "vocab_size": 128_256, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14_336, "max_position_embeddings": 32_768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32_000,
    }),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14_336, "max_position_embeddings": 32_768,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32_000,
    }),
    "Qwen/Qwen2.5-0.5B": (494_032_768, {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32_768, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "sliding_window": 32_768, "tie_word_embeddings": True, "use_mrope": False,
        "use_sliding_window": False, "vocab_size": 151_936,
    }),
    "Qwen/Qwen3-0.6B": (596_049_920, {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40_960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1_000_000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151_936,
    }),
    "google/gemma-2b": (2_506_172_416, GEMMA | {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu", "hidden_size": 2048,
        "intermediate_size": 16_384, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "rope_scaling": None, "vocab_size": 256_000,
    }),
    "google/gemma-2-2b": (2_614_341_888, GEMMA | {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "vocab_size": 256_000,
    }),
    "google/gemma-3-1b-it": (999_885_952, {key: value for key, value in GEMMA.items() if key != "hidden_act"} | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "final_logit_softcapping": None, "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32_768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10_000, "rope_scaling": None, "rope_theta": 1_000_000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262_144, "eos_token_id": [1, 106],
    }),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "_name_or_path": "Phi-3-mini-4k-instruct",
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "attention_bias": False, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 10_000.0, "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32_064,
    }),
    "EleutherAI/pythia-160m": (162_322_944, {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12, "rotary_emb_base": 10_000,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50_304,
    }),
    "google-t5/t5-small": (60_506_624, {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 512,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "initializer_factor": 1.0, "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6, "n_positions": 512, "num_heads": 8, "num_layers": 6, "output_past": True,
        "relative_attention_num_buckets": 32, "vocab_size": 32_128,
        "task_specific_params": {"translation_en_to_de": {"prefix": "translate English to German: "}},
    }),
    "google/flan-t5-small": (76_961_152 - 32_128 * 512, {  # but for its head, of which its tensors tell
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 1024, "d_kv": 64, "d_model": 512,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "n_positions": 512, "num_decoder_layers": 8,
        "num_heads": 6, "num_layers": 8, "output_past": True, "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "vocab_size": 32_128,
    }),
    "facebook/bart-base": (139_420_416 + 50_265, BART | {  # with the bias of the logits, a buffer there
        "architectures": ["BartForConditionalGeneration"], "d_model": 768, "decoder_attention_heads": 12,
        "decoder_ffn_dim": 3072, "decoder_layers": 6, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072,
        "encoder_layers": 6, "max_position_embeddings": 1024, "num_hidden_layers": 6, "vocab_size": 50_265,
    }),
    "Helsinki-NLP/opus-mt-en-de": (73_886_208 + 58_101, BART | {
        "architectures": ["MarianMTModel"], "model_type": "marian", "activation_function": "swish", "d_model": 512,
        "bad_words_ids": [[58_100]], "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layers": 6,
        "decoder_vocab_size": 58_101, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "encoder_layers": 6,
        "max_position_embeddings": 512, "normalize_embedding": False, "num_hidden_layers": 6, "pad_token_id": 58_100,
        "scale_embedding": True, "share_encoder_decoder_embeddings": True, "static_position_embeddings": True,
        "vocab_size": 58_101,
    }),
    "google-bert/bert-base-multilingual-cased": (177_974_523, {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi", "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12,
        "num_hidden_layers": 12, "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128, "pooler_type": "first_token_transform", "position_embedding_type": "absolute",
        "type_vocab_size": 2, "vocab_size": 119_547,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_its_weights_are(name):
    count, values = PUBLISHED[name]
    _, cfg = read_family(values | OLD, name)
    assert tx.count_params(cfg) == count
