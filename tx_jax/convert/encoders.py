"""Encoders and encoder-decoders as data: BERT, RoBERTa; T5, BART, Marian."""

from typing import Any

from tx_jax.config import ModelConfig
from tx_jax.convert.family import GELUS, Family, blocks, eps, sizes
from tx_jax.convert.fields import Field, Values, alias, choice, copy, number, one_of, only
from tx_jax.convert.mapping import Table


def _roberta_positions() -> Field:
    """Positions begin behind that of padding, in a table that counts all."""

    def read(v: Values) -> dict[str, Any]:
        offset = number("pad_token_id", v["pad_token_id"] + 1 if isinstance(v["pad_token_id"], int) else None)
        return {
            "position_offset": offset,
            "max_len": number("max_position_embeddings", v["max_position_embeddings"]) - offset,
        }

    def write(cfg: ModelConfig) -> dict[str, Any]:
        offset = cfg.position_offset
        return {"max_position_embeddings": cfg.max_len + offset, "pad_token_id": offset - 1}

    return Field({"max_position_embeddings": 512, "pad_token_id": 1}, read, write)


def _t5_activation(choices: dict[str, str]) -> Field:
    """feed_forward_proj; what follows from it is written beside it by transformers."""
    proj = choice("feed_forward_proj", "mlp", choices, "relu")

    def read(v: Values) -> dict[str, Any]:
        found = proj.read(v)
        gated = v["feed_forward_proj"].startswith("gated-")
        one_of("is_gated_act", v["is_gated_act"], None, gated)
        name = v["feed_forward_proj"].removeprefix("gated-")
        one_of("dense_act_fn", v["dense_act_fn"], None, "gelu_new" if (gated and name == "gelu") else name)
        return found

    return Field(proj.defaults | {"is_gated_act": None, "dense_act_fn": None}, read, proj.write)


def _t5_scale() -> Field:
    """v1 scales what its head reads: transformers 4 says so by tie_word_embeddings, false in v1.1, and 5 aloud."""

    def read(v: Values) -> dict[str, Any]:
        tied = one_of("tie_word_embeddings", v["tie_word_embeddings"], True, False)
        scale = v["scale_decoder_outputs"]
        return {"scale_head": tied if scale is None else one_of("scale_decoder_outputs", scale, True, False)}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return {"tie_word_embeddings": cfg.scale_head}

    return Field({"tie_word_embeddings": True, "scale_decoder_outputs": None}, read, write)


TWO_STACKS = only("is_encoder_decoder", True)
T5_BASE = {
    "stack": "encoder_decoder",
    "positions": "t5",
    "attention_scale": 1.0,
    "norm": "rmsnorm",
    "norm_order": "pre",
}


def _t5_fields(activations: dict[str, str]) -> tuple[Field, ...]:
    return (
        copy("vocab_size", "vocab_size", 32_128), copy("n_positions", "max_len", 512), copy("d_model", "d_model", 512),
        copy("d_kv", "H", 64)._replace(read=lambda v: {"d_head": v["d_kv"]}),
        copy("d_ff", "F", 2048)._replace(read=lambda v: {"d_mlp": v["d_ff"]}),
        Field(
            {"num_layers": 6, "num_decoder_layers": None},
            lambda v: {"n_encoder_layers": v["num_layers"], "n_layers": v["num_decoder_layers"] or v["num_layers"]},
            lambda cfg: {"num_layers": cfg.n_encoder_layers or cfg.n_layers, "num_decoder_layers": cfg.n_layers},
        ),
        copy("num_heads", "n_heads", 8), copy("relative_attention_num_buckets", "n_buckets", 32),
        copy("relative_attention_max_distance", "max_distance", 128), eps(1e-6, "layer_norm_epsilon"),
        _t5_activation(activations), _t5_scale(), TWO_STACKS,
    )  # fmt: skip


def _t5_table(up: Table) -> Table:
    """T5's tensors; layer 1 of a block of the decoder is its cross-attention."""
    names = {"q": "q", "k": "k", "v": "v", "o": "out"}
    cross = {f"layer.1.EncDecAttention.{theirs}": f"cross_attention/{ours}" for theirs, ours in names.items()}
    own = {f"layer.0.SelfAttention.{theirs}": f"attention/{ours}" for theirs, ours in names.items()}
    own |= {"layer.0.layer_norm": "attention_norm", "layer.1.layer_norm": "cross_norm"}
    table = {"shared.weight": "embed/table", "lm_head": "head/map"}
    for stack, last in (("encoder", "layer.1."), ("decoder", "layer.2.")):
        mlp = {f"{last}DenseReluDense.{name}": row for name, row in (up | {"wo": "mlp/down"}).items()}
        block = own | cross | mlp | {f"{last}layer_norm": "mlp_norm"}
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table |= {bias: f"{stack}/positions/table", f"{stack}.final_layer_norm": f"{stack}/last_norm"}
        table |= blocks(block, f"{stack}.block.{{i}}.", f"{stack}/blocks_{{i}}/")
    return table


T5_UNUSED = r".*\.EncDecAttention\.relative_attention_bias\.weight"  # of old files; transformers passes it over
T5_REPEATS = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
BART_ATTENTION: Table = {f"{name}_proj": name for name in ("q", "k", "v", "out")}
BART_REPEATS = {f"model.{stack}.embed_tokens.weight": "model.shared.weight" for stack in ("encoder", "decoder")}


def _bart_table(**more: str) -> Table:
    """BART's tensors, and Marian's, which has no learned positions."""
    own = {f"self_attn.{theirs}": f"attention/{ours}" for theirs, ours in BART_ATTENTION.items()}
    cross = {f"encoder_attn.{theirs}": f"cross_attention/{ours}" for theirs, ours in BART_ATTENTION.items()}
    norms = {
        "self_attn_layer_norm": "attention_norm",
        "encoder_attn_layer_norm": "cross_norm",
        "final_layer_norm": "mlp_norm",
    }
    block = own | cross | norms | {"fc1": "mlp/up", "fc2": "mlp/down"}
    table = {"model.shared.weight": "embed/table", "lm_head": "head/map", "final_logits_bias": "head/bias row"}
    for stack in ("encoder", "decoder"):
        table |= {f"model.{stack}.{name}": f"{stack}/{row}" for name, row in more.items()}
        table |= blocks(block, f"model.{stack}.layers.{{i}}.", f"{stack}/blocks_{{i}}/")
    return table


def _bart_fields(vocab_size: int) -> tuple[Field, ...]:
    """Both stacks must have one width and as many heads, as nearly all published models have."""
    return (
        copy("vocab_size", "vocab_size", vocab_size), copy("max_position_embeddings", "max_len", 1024),
        copy("d_model", "d_model", 1024), copy("encoder_layers", "n_encoder_layers", 12)._replace(
            write=lambda cfg: {"encoder_layers": cfg.n_encoder_layers or cfg.n_layers}),
        copy("decoder_layers", "n_layers", 12), alias("num_hidden_layers", "encoder_layers", 12),
        copy("encoder_attention_heads", "n_heads", 16), _both("decoder_attention_heads", "encoder_attention_heads", 16),
        copy("encoder_ffn_dim", "F", 4096)._replace(read=lambda v: {"d_mlp": v["encoder_ffn_dim"]}),
        _both("decoder_ffn_dim", "encoder_ffn_dim", 4096),
        choice("activation_function", "mlp", GELUS | {"swish": "silu", "silu": "silu"}, "gelu"),
        copy("scale_embedding", "scale_embeddings", False), copy("tie_word_embeddings", "tie_head", True),
        TWO_STACKS, only("normalize_before", None, False), only("add_final_layer_norm", None, False),
        only("add_bias_logits", None, False), only("static_position_embeddings", None, False, True),
    )  # fmt: skip


def _both(key: str, other: str, default: int) -> Field:
    """A size of the decoder that must be the encoder's."""
    field = alias(key, other, default)
    return field._replace(
        defaults={key: default, other: default},
        write=lambda cfg: {key: {"heads": cfg.n_heads, "dim": cfg.F}[key.split("_")[-1]]},
    )


BART_BASE = {
    "stack": "encoder_decoder", "norm": "layernorm", "norm_order": "post", "norm_eps": 1e-5, "biases": "all",
    "head_bias": True,
}  # fmt: skip
NO_BIAS = {"final_logits_bias": {"head_bias": False}}


def _bert_table(root: str) -> Table:
    """BERT's tensors; RoBERTa's are the same but for the head."""
    block = {
        "attention.self.query": "attention/q", "attention.self.key": "attention/k",
        "attention.self.value": "attention/v",
        "attention.output.dense": "attention/out", "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp/up", "output.dense": "mlp/down", "output.LayerNorm": "mlp_norm",
    }  # fmt: skip
    return {
        f"{root}embeddings.word_embeddings.weight": "embed/table",
        f"{root}embeddings.position_embeddings.weight": "stack/positions/table",
        f"{root}embeddings.token_type_embeddings.weight": "types",
        f"{root}embeddings.LayerNorm": "stack/first_norm",
        f"{root}pooler.dense": "pool",
    } | blocks(block, f"{root}encoder.layer.{{i}}.", "stack/blocks_{i}/")


BERT_HEAD: Table = {
    "cls.predictions.transform.dense": "head/transform", "cls.predictions.transform.LayerNorm": "head/norm",
    "cls.predictions.bias": "head/bias", "cls.predictions.decoder": "head/map",
}  # fmt: skip
ROBERTA_HEAD: Table = {
    "lm_head.dense": "head/transform", "lm_head.layer_norm": "head/norm", "lm_head.bias": "head/bias",
    "lm_head.decoder": "head/map",
}  # fmt: skip
BERT_BASE = {
    "stack": "encoder", "norm_embeddings": True, "positions": "learned", "biases": "all", "norm": "layernorm",
    "norm_order": "post",
}  # fmt: skip
MLM_BASE = BERT_BASE | {"head_bias": True, "head_transform": True}
POOLED = {"pooler.dense.weight": {"pooler": False}}
BERT_FIELDS = (
    *sizes(30_522, 768, 3072, 12, 12, 512), choice("hidden_act", "mlp", GELUS, "gelu"),
    copy("type_vocab_size", "n_token_types", 2), eps(1e-12, "layer_norm_eps"), copy("tie_word_embeddings", "tie_head",
    True),
    only("position_embedding_type", "absolute"),
)  # fmt: skip
ROBERTA_FIELDS = (
    copy("vocab_size", "vocab_size", 50_265), _roberta_positions(),
    *(field for field in BERT_FIELDS if not {"vocab_size", "max_position_embeddings"} & field.defaults.keys()),
)  # fmt: skip
XLM_FIELDS = (copy("vocab_size", "vocab_size", 30_522), *ROBERTA_FIELDS[1:])


def _bert_like(name: str, model_type: str, fields: tuple[Field, ...], root: str, head: Table) -> tuple[Family, ...]:
    """The bare encoder with its pooler, and the one with a head for masked tokens."""
    unused = rf"({root})?(embeddings\.position_ids|pooler\.dense\.\w+)|cls\.seq_relationship\.\w+"
    bare = BERT_BASE | {"pooler": True}
    own, bias = (next(source for source, row in head.items() if row == f"head/{part}") for part in ("map", "bias"))
    return (
        Family(f"{name}Model", model_type, bare, fields, _bert_table(""), unused=rf"({root})?embeddings\.position_ids",
               absent=POOLED, outer=root),
        Family(f"{name}ForMaskedLM", model_type, MLM_BASE, fields, _bert_table(root) | head, prefix=root,
               head=f"{own}.weight", repeats={f"{own}.bias": bias}, unused=unused),
    )  # fmt: skip


ENCODERS = (
    *_bert_like("Bert", "bert", BERT_FIELDS, "bert.", BERT_HEAD),
    *_bert_like("Roberta", "roberta", ROBERTA_FIELDS, "roberta.", ROBERTA_HEAD),
    *_bert_like("XLMRoberta", "xlm-roberta", XLM_FIELDS, "roberta.", ROBERTA_HEAD),
)
TRANSLATORS = (
    Family(
        "T5ForConditionalGeneration", "t5", T5_BASE, _t5_fields({"relu": "relu", "gelu": "gelu", "silu": "silu"}),
        _t5_table({"wi": "mlp/up"}), unused=T5_UNUSED, repeats=T5_REPEATS,
    ),
    Family(  # v1.1 and flan
        "T5ForConditionalGeneration", "t5", T5_BASE, _t5_fields({"gated-gelu": "geglu_tanh", "gated-silu": "swiglu"}),
        _t5_table({"wi_0": "mlp/gate", "wi_1": "mlp/up"}), unused=T5_UNUSED, repeats=T5_REPEATS,
    ),
    Family(
        "BartForConditionalGeneration", "bart",
        BART_BASE | {"positions": "learned", "position_offset": 2, "norm_embeddings": True},
        (*_bart_fields(50_265), only("normalize_embedding", None, True), only("extra_pos_embeddings", None, 2)),
        _bart_table(**{"embed_positions.weight": "positions/table", "layernorm_embedding": "first_norm"}),
        prefix="model.", repeats=BART_REPEATS, absent=NO_BIAS,
    ),
    Family(
        "MarianMTModel", "marian", BART_BASE | {"positions": "sinusoidal_concat"},
        (
            *_bart_fields(58_101), only("share_encoder_decoder_embeddings", True), only("normalize_embedding", None,
            False),
            alias("decoder_vocab_size", "vocab_size", 58_101),
        ),
        _bart_table(), prefix="model.", repeats=BART_REPEATS,
        unused=r"model\.(encoder|decoder)\.embed_positions\.weight", absent=NO_BIAS,
    ),
)  # fmt: skip
