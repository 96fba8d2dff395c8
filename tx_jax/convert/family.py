"""What a public family of models is: its name, what its config.json says, and what its tensors are called here.

A `Family` is data, and all that there is of one. decoders.py and encoders.py have them, this file what several share.
Sources: the configurations and modules of transformers 4 and 5, to whose defaults a test holds each field.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tx_jax.config import ModelConfig
from tx_jax.convert.fields import Field, Values, copy, number, one_of
from tx_jax.convert.mapping import Table


class Family(NamedTuple):
    """One architecture of config.json."""

    architecture: str
    model_type: str
    base: dict[str, Any]  # what all its models have
    fields: tuple[Field, ...]
    table: Table
    prefix: str = ""  # of all names but the head's; a file of the bare model leaves it out
    outer: str = ""  # that a file may have before all names
    head: str = "lm_head.weight"  # the logits' own table; where it is tied, the file may repeat it
    repeats: Mapping[str, str] = MappingProxyType({})  # names that a file may have twice; both must be equal
    unused: str = "(?!)"  # a pattern of names that may be there and are not read, such as buffers
    absent: Mapping[str, dict[str, Any]] = MappingProxyType({})  # what a file without this tensor says of its config


def attention_bias(names: dict[tuple[bool, bool], str], mlp_key: str | None = None, default: bool = False) -> Field:
    """attention_bias (and mlp_bias) as our `biases`."""
    inverse = {ours: theirs for theirs, ours in names.items()}
    keys = {"attention_bias": default} | ({mlp_key: False} if mlp_key else {})

    def read(v: Values) -> dict[str, Any]:
        flags = tuple(one_of(key, v[key], False, True) for key in keys)
        return {"biases": names[flags if mlp_key else (flags[0], False)]}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return dict(zip(keys, inverse.get(cfg.biases, (None, None)), strict=False))

    return Field(keys, read, write)


def query_scalar(default: int) -> Field:
    """Scores × 1/√query_pre_attn_scalar."""

    def write(cfg: ModelConfig) -> dict[str, Any]:
        scalar = round(cfg.score_scale**-2, 6)
        return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar}

    key = "query_pre_attn_scalar"
    return Field({key: default}, lambda v: {"attention_scale": number(key, v[key], float) ** -0.5}, write)


def sizes(vocab: int, width: int, mlp: int, layers: int, heads: int, length: int) -> tuple[Field, ...]:
    """The names that nearly all families have for their sizes, with transformers' defaults."""
    return (
        copy("vocab_size", "vocab_size", vocab), copy("hidden_size", "d_model", width),
        copy("intermediate_size", "F", mlp)._replace(
            read=lambda v: {"d_mlp": number("intermediate_size", v["intermediate_size"])}),
        copy("num_hidden_layers", "n_layers", layers), copy("num_attention_heads", "n_heads", heads),
        copy("max_position_embeddings", "max_len", length),
    )  # fmt: skip


def kv_heads(default: int | None) -> Field:
    return copy("num_key_value_heads", "K", default)._replace(read=lambda v: {"n_kv_heads": v["num_key_value_heads"]})


def head_dim(default: int | None) -> Field:
    return copy("head_dim", "H", default)._replace(read=lambda v: {"d_head": v["head_dim"]})


def experts(default: int, per_token: int) -> tuple[Field, Field]:
    """How many experts there are, and how many of them read a token."""
    keys = {"num_local_experts": ("n_experts", default), "num_experts_per_tok": ("n_experts_per_token", per_token)}
    some, few = (
        copy(key, name, value)._replace(read=lambda v, key=key, name=name: {name: number(key, v[key])})
        for key, (name, value) in keys.items()
    )
    return some, few


def tied(default: bool) -> Field:
    return copy("tie_word_embeddings", "tie_head", default)


def eps(default: float, key: str = "rms_norm_eps") -> Field:
    return copy(key, "norm_eps", default)


GELUS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def blocks(table: Table, source: str, target: str) -> Table:
    """The table of one layer, for all."""
    return {source + name: target + row for name, row in table.items()}
