"""Public models, in and out: a Hugging Face directory, or a GGUF file, as a ModelConfig and a parameter tree.

Which family a directory holds is read from its config.json; which one can hold a model of ours is found by trying:
the first family whose config.json, read back, gives the same model.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tx_jax.config import ModelConfig, RotaryConfig
from tx_jax.config_json import read_object
from tx_jax.convert.decoders import DECODERS
from tx_jax.convert.encoders import ENCODERS, TRANSLATORS
from tx_jax.convert.family import Family
from tx_jax.convert.fields import MAX_LAYERS, read_model_config
from tx_jax.convert.files import INDEX, WEIGHTS, Tensors, open_safetensors, save_safetensors
from tx_jax.convert.gguf import open_gguf
from tx_jax.convert.gguf_models import ROPE_FREQS, gguf_values, with_rope_freqs
from tx_jax.convert.mapping import check_leaves, check_names, entries, leaf_shapes, match_names, pack, unpack
from tx_jax.data.tokenizers import replace_file
from tx_jax.errors import InputError, require
from tx_jax.parallel import shardings

FAMILIES = DECODERS + ENCODERS + TRANSLATORS
SPECIAL_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id",
)  # fmt: skip
GGUF_IDS = {"bos_token_id": ("bos",), "eos_token_id": ("eos", "eot", "eom"), "pad_token_id": ("padding",)}
DTYPES = {None: None, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Source(NamedTuple):
    """A model whose weights are not in memory yet."""

    cfg: ModelConfig
    special_ids: dict[str, Any]  # bos_token_id, eos_token_id, …: those of SPECIAL_IDS that the files give
    architecture: str | None  # of transformers; None: of a run of train.py
    load: Callable[[str | None, Mesh | None], dict]  # (dtype, mesh) → the parameters


def open_directory(root: Path) -> Source:
    """The model in a Hugging Face directory with safetensors.

    Raises:
        InputError: there is no such model, its architecture or an option of its config is not honoured, or its tensors
            are not those of its config.
    """
    values = read_object(root / "config.json")
    family, cfg = read_family(values, str(root / "config.json"))
    generation = root / "generation_config.json"
    ids = values | (read_object(generation) if generation.exists() else {})
    named = {key: ids[key] for key in SPECIAL_IDS if ids.get(key) not in (None, -1)}  # −1: old files' for none
    for key, value in named.items():
        _check_special(key, value, cfg.vocab_size or 0, str(root))
    cfg, load = _open_tensors(family, cfg, open_safetensors(root), str(root))
    return Source(cfg, named, family.architecture, load)


def open_gguf_model(path: Path) -> Source:
    """The model in a GGUF file. Raises as `open_directory` does."""
    metadata, tensors = open_gguf(path)
    family, values = gguf_values(metadata)
    cfg = read_model_config(family.base, family.fields, values, str(path))
    for _, divisors in tensors.read({ROPE_FREQS}):
        cfg = with_rope_freqs(cfg, divisors)
    cfg, load = _open_tensors(family, cfg, tensors, str(path))
    said = {key: [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names] for key, names in GGUF_IDS.items()}
    ids = {key: sorted({i for i in found if i is not None}) for key, found in said.items()}
    special = {key: found[0] if len(found) == 1 else found for key, found in ids.items() if found}
    return Source(cfg, special, family.architecture, load)


def _check_special(key: str, value: Any, vocab_size: int, where: str) -> None:
    ids = value if isinstance(value, list) else [value]
    fits = all(type(i) is int and 0 <= i < vocab_size for i in ids)
    require(
        fits, f"{key}={value!r:.80} in {where} must be an id, or a list of ids, from 0 to {vocab_size - 1}; mend it"
    )


def read_family(values: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """The family that a config.json names, and its ModelConfig.

    Raises:
        InputError: the architecture is unknown, or an option is not honoured.
    """
    named, kind = values.get("architectures"), values.get("model_type")
    name = named[0] if isinstance(named, list) and named else named
    fits = [family for family in FAMILIES if (family.architecture == name if name else family.model_type == kind)]
    known = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES))
    require(fits, f"{where} has architectures={named!r:.80}, model_type={kind!r:.40}; those read are {known}")
    error = InputError()
    for family in fits:  # of one name in several forms, the first that has all of its options
        try:
            return family, read_model_config(family.base, family.fields, values, where)
        except InputError as reason:
            error = reason
    raise error


def _open_tensors(
    family: Family, cfg: ModelConfig, tensors: Tensors, where: str
) -> tuple[ModelConfig, Callable[[str | None, Mesh | None], dict]]:
    """The config as the tensors have it, with a head of its own if theirs is not the table; and what loads them.

    Raises:
        InputError: the tensors are not those of the config.
    """
    depth = cfg.n_layers + (cfg.n_encoder_layers or 0)
    require(depth <= MAX_LAYERS, f"{where} has {depth} layers, more than {MAX_LAYERS}")
    rule, of_what = f"{where} has {len(tensors.shapes)} tensors", f" of {cfg.E} experts" if cfg.n_experts else ""
    require(depth * cfg.E <= len(tensors.shapes), f"{rule}, too few for {depth} layers{of_what}")
    for name, says in family.absent.items():
        if not {name, family.prefix + name, family.outer + name} & set(tensors.shapes):
            cfg = dataclasses.replace(cfg, **says)
    unused = family.unused
    table = next(name for name, row in family.table.items() if row == "embed/table")
    for name, twin in {**family.repeats, **({family.head: table} if cfg.tie_head else {})}.items():
        if name not in tensors.shapes:
            continue
        equal = _equal(tensors, name, {twin, twin.removeprefix(family.prefix)})
        require(equal or name == family.head, f"{name} is not {twin} in {where}; this architecture has one for both")
        if equal:
            unused = f"{unused}|{re.escape(name)}"
        else:
            cfg = dataclasses.replace(cfg, tie_head=False)  # as transformers 5 does; T5 v1.1 says nothing else of it
    shapes = leaf_shapes(cfg)
    expected = entries(family.table, shapes)
    names = match_names(tensors.shapes, expected, unused, family.prefix, family.outer)
    twice = sorted(name for name, ours in names.items() if name != ours and ours in names)
    require(not twice, f"{where} has {', '.join(twice[:3])} under two names, with and without a prefix; remove one")
    check_names({ours: tensors.shapes[name] for name, ours in names.items()}, expected, unused, where)

    def load(dtype: str | None, mesh: Mesh | None) -> dict:
        flat = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
        place = {} if mesh is None else shardings(flat, mesh)

        def put(path: str, leaf: np.ndarray) -> jax.Array:
            kind = DTYPES[dtype] or (leaf.dtype if leaf.dtype != np.float64 else jnp.float32)
            leaf = _cast(path, leaf, kind)
            return jax.block_until_ready(jax.device_put(leaf, place.get(path)))  # or copies of several would be held

        return unpack(tensors, names, expected, cfg.H, put, where)

    return cfg, load


def _equal(tensors: Tensors, name: str, twins: set[str]) -> bool:
    """Whether a tensor is the same as the one of its twins that is there."""
    there = {name, *twins} & set(tensors.shapes)
    if len({tensors.shapes[one] for one in there}) > 1:
        return False
    found = [tensor for _, tensor in tensors.read(there)]
    return len(found) == 2 and np.array_equal(found[0], found[1])


def save_pretrained(
    directory: str | os.PathLike[str],
    cfg: ModelConfig,
    params: dict,
    *,
    special_ids: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> str:
    """Write a directory that transformers loads: config.json, generation_config.json, safetensors. Its architecture.

    Args:
        special_ids: bos_token_id and so on, for both configs.
        architecture: of transformers, where several could hold the model; None: the first that can.
        dtype: of the tensors; None: that of the parameters.

    >>> import tempfile, tx_jax as tx
    >>> cfg = ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1, mlp="swiglu", norm="rmsnorm")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_pretrained(directory, cfg, tx.init_params(tx.build(cfg), jax.random.key(0)))
    'LlamaForCausalLM'

    Raises:
        InputError: no architecture can hold this model, params are not its own, the directory holds a model already, or
            dtype is unknown or too narrow.
    """
    require(dtype in DTYPES, f"dtype={dtype!r} is not one of float32, bfloat16, float16, or None, as they are")
    root = Path(directory).expanduser()
    taken = [name for name in ("config.json", WEIGHTS, INDEX) if (root / name).exists()]
    require(not taken, f"{root} holds {', '.join(taken)} already; name another directory")
    family, cfg = find_family(cfg, architecture)
    values = write_config(family, cfg)
    shapes = leaf_shapes(cfg)
    check_leaves(params, shapes)
    expected = entries(family.table, shapes)
    kind = DTYPES[dtype]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in pack(params, expected, cfg.H):
            yield name, tensor if kind is None else _cast(name, tensor, kind)

    save_safetensors(root, tensors(), max_shard_bytes)
    stored = dtype or str(next(iter(jax.tree.leaves(params))).dtype)
    ids = {key: value for key, value in (special_ids or {}).items() if value is not None}
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # or transformers would take the family's
    _write_json(root / "config.json", none | values | ids | {"torch_dtype": stored})
    if cfg.stack != "encoder":
        _write_json(root / "generation_config.json", {**ids, "_from_model_config": True})
    return family.architecture


def _cast(name: str, array: np.ndarray, kind: Any) -> np.ndarray:
    if array.dtype == kind:
        return array
    with np.errstate(over="ignore"):
        found = array.astype(kind)
    fits = kind != jnp.float16 or np.isfinite(found).all() or not np.isfinite(array).all()
    require(fits, f"{name} holds {np.abs(array).max():.3g}, beyond float16's 65504; use dtype bfloat16 or float32")
    return found


def write_config(family: Family, cfg: ModelConfig) -> dict[str, Any]:
    """What a family's config.json says of a model."""
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for field in family.fields:
        values |= field.write(cfg)
    return values


def find_family(cfg: ModelConfig, architecture: str | None = None) -> tuple[Family, ModelConfig]:
    """The first family that can hold a model of this config, and the config as it holds it: with biases of zero where
    the family has some and the model has none.

    Raises:
        InputError: there is none.
    """
    known = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES))
    families = [family for family in FAMILIES if architecture in (None, family.architecture)]
    require(families, f"architecture={architecture!r} is not one of {known}")
    nearest, reason = list[str](), ""
    for family in families:
        for biases in dict.fromkeys((cfg.biases, *WIDER[cfg.biases])):
            try:
                wide = dataclasses.replace(cfg, biases=biases)  # which experts do not have everywhere
                back = read_model_config(family.base, family.fields, write_config(family, wide), family.architecture)
            except InputError as error:
                reason = str(error)
                continue
            wanted, found = (dataclasses.asdict(resolved(one)) for one in (wide, back))
            differs = [name for name in wanted if wanted[name] != found[name]]
            for says in family.absent.values():
                differs = [one for one in differs if says.get(one) != wanted[one]]
            if differs == ["tie_head"] and not cfg.tie_head and family.head in entries(family.table, leaf_shapes(wide)):
                differs = []  # the head's presence says it
            if not differs:
                return family, wide
            if not nearest or len(differs) < len(nearest):
                nearest = [f"{name}={wanted[name]!r} ({family.architecture} has {found[name]!r})" for name in differs]
    why = f"no architecture that is written here has {', '.join(nearest)}" if nearest else reason
    named = f"architecture={architecture!r} cannot hold this model; leave it out"
    raise InputError(f"{why}; {'write it yourself' if architecture is None else named}")


WIDER = {  # biases that hold those of the key, others being zero
    "none": ("norm", "qkv", "mlp", "attention", "all"), "norm": ("mlp", "all"), "mlp": ("all",),
    "qkv": ("attention", "all"), "attention": ("all",), "all": (),
}  # fmt: skip


def resolved(cfg: ModelConfig) -> ModelConfig:
    """The config with what defaults stand for, and without what changes no logit: two that are equal are one model."""
    unset = {
        "n_encoder_layers": cfg.n_encoder_layers or cfg.n_layers if cfg.stack == "encoder_decoder" else None,
        "tie_source": cfg.tie_source or cfg.stack != "encoder_decoder",
        "window_pattern": (cfg.window_pattern * cfg.n_layers)[: cfg.n_layers] if cfg.window else "w",
        "rotary": cfg.rotary if cfg.positions.startswith("rotary") else RotaryConfig(),
        "biases": "none" if cfg.biases == "norm" and cfg.norm != "layernorm" else cfg.biases,
        "position_offset": cfg.position_offset if cfg.positions == "learned" else 0,
        "n_buckets": cfg.n_buckets if cfg.positions == "t5" else 32,
        "max_distance": cfg.max_distance if cfg.positions == "t5" else 128,
        "attention_scale": cfg.score_scale,
        "n_experts_per_token": cfg.n_experts_per_token if cfg.n_experts else 2,
    }
    training = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0, "init": "normal", "dtype": "float32"}
    training |= {"capacity_factor": None}
    return dataclasses.replace(cfg, n_kv_heads=cfg.K, d_head=cfg.H, d_value=cfg.Hv, d_mlp=cfg.F, **unset, **training)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode("utf-8"))
