"""What the keys of a public `config.json` say of a ModelConfig, in both directions.

A `Field` knows a few keys: what they are where a file leaves them out, what they mean here, and how to write them. A
family is a tuple of fields, so that a key is honoured by one of them or refused by its name; none is passed over.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tx_jax.config import ModelConfig, RotaryConfig
from tx_jax.errors import InputError, require

Values = Mapping[str, Any]
MAX_LAYERS = 1000  # the deepest in use have some hundred


class Field(NamedTuple):
    """Some keys of a config.json."""

    defaults: dict[str, Any]  # by key: what transformers takes where a file has none
    read: Callable[[Values], dict[str, Any]]  # values of these keys → keyword arguments of ModelConfig
    write: Callable[[ModelConfig], dict[str, Any]]  # what to write


def copy(key: str, name: str, default: Any) -> Field:
    """The key is our field `name` under another name."""
    return Field({key: default}, lambda v: {name: v[key]}, lambda cfg: {key: getattr(cfg, name)})


def choice(key: str, name: str, choices: dict[Any, Any], default: Any) -> Field:
    """The key's value names one of our choices; the first key of several for the same choice is written."""
    inverse = {ours: theirs for theirs, ours in reversed(choices.items())}

    def read(values: Values) -> dict[str, Any]:
        return {name: choices[one_of(key, values[key], *choices)]}

    return Field({key: default}, read, lambda cfg: {key: inverse.get(getattr(cfg, name))})


def only(key: str, *allowed: Any) -> Field:
    """The key has no other value than these; the first is transformers' own, and need not be written."""

    def read(values: Values) -> dict[str, Any]:
        one_of(key, values[key], *allowed)
        return {}

    return Field({key: allowed[0]}, read, lambda cfg: {})


def alias(key: str, other: str, default: Any) -> Field:
    """A key that may be there beside another, and must then have its value."""

    def read(values: Values) -> dict[str, Any]:
        one_of(key, values[key], None, values[other])
        return {}

    return Field({key: None, other: default}, read, lambda cfg: {})


def one_of(key: str, value: Any, *allowed: Any) -> Any:
    """The value, held to those that are honoured."""
    choices = ", ".join(f"{choice!r:.80}" for choice in allowed)
    # Types are alike, or those of numbers: 10000 is 10000.0, but 1 is not True, and a list is no key of a dict.
    numbers = {int, float}
    alike = [one for one in allowed if type(one) is type(value) or {type(one), type(value)} == numbers]
    found = any(value is one or value == one for one in alike)
    require(found, f"{key}={value!r:.80} is not honoured; this family is read with {key} of {choices}")
    return value


def number(key: str, value: Any, kind: type = int) -> Any:
    """The value, held to a positive number that a model may have."""
    fits = type(value) is int or (kind is float and type(value) is float)
    require(fits and 0 < value < 1e9, f"{key}={value!r:.80} must be a positive {kind.__name__}")
    return kind(value)


# Keys that change no logit: names, ids of special tokens, dropout, initialisation, how generation was once called,
# what a file says of code to run. Dropout is chosen where a model is trained.
WITHOUT_EFFECT = frozenset("""
    _name_or_path architectures model_type transformers_version torch_dtype dtype use_cache auto_map
    trust_remote_code _attn_implementation attn_implementation _attn_implementation_autoset gradient_checkpointing
    pretraining_tp torchscript use_bfloat16 tokenizer_class prefix task_specific_params finetuning_task
    problem_type num_labels id2label label2id output_attentions output_hidden_states output_past return_dict
    return_dict_in_generate output_scores tf_legacy_loss _num_labels model_name license unsloth_version
    unsloth_fixed initializer_range initializer_factor init_std chunk_size_feed_forward bos_token_id eos_token_id
    pad_token_id sep_token_id unk_token_id mask_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens attention_dropout
    attention_probs_dropout_prob hidden_dropout_prob hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout
    activation_dropout classifier_dropout classif_dropout dropout_rate residual_dropout embedding_dropout
    encoder_layerdrop decoder_layerdrop summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences exponential_decay_length_penalty remove_invalid_values
    force_bos_token_to_be_generated n_ctx n_special predict_special_tokens cache_implementation _commit_hash
    transformers.js_config directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type router_aux_loss_coef router_jitter_noise output_router_logits
""".split())  # fmt: skip  # noqa: SIM905


def _read_scaling(rope: dict[str, Any], max_len: Any) -> dict[str, Any]:
    """RotaryConfig's arguments from one `rope_parameters` (or the older `rope_scaling`)."""
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    names = SCALINGS[one_of("rope_type", kind, *SCALINGS)]
    found: dict[str, Any] = {"scaling": "none" if kind == "default" else kind}
    if "original_max_position_embeddings" in names:
        found["original_len"] = max_len
    missing = sorted(names.keys() - rope.keys() - MAY_BE_ABSENT)
    require(not missing, f"rope_scaling of {kind!r} has no {', '.join(missing)}; fetch the file again")
    for key, value in rope.items():
        require(key in names, f"rope_scaling has {key}={value!r:.80}, which is not honoured for {kind!r}; remove it")
        found[names[key]] = number(key, value, int if names[key] == "original_len" else float)
    return found


SCALINGS = {  # of rotary angles: RotaryConfig's names of what each kind has
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_len",
    },
    "yarn": {
        "factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
        "original_max_position_embeddings": "original_len",
    },
}  # fmt: skip


MAY_BE_ABSENT = {"beta_fast", "beta_slow", "original_max_position_embeddings"}


def rope(
    theta: float = 10_000.0,
    *,
    theta_key: str = "rope_theta",
    fraction: float | None = None,
    fraction_key: str = "partial_rotary_factor",
    window_theta: float | None = None,
) -> Field:
    """Rotary positions, in the layout of transformers 4 (rope_theta, rope_scaling) and of 5 (rope_parameters).

    Args:
        theta: where the file has none.
        fraction: of each head that is turned, where the file has none; None: the family turns all.
        window_theta: of layers that see a window, where the file has none; None: the family has one θ.
    """
    local_key = "rope_local_base_freq"
    defaults = {"rope_parameters": None, theta_key: theta, "rope_scaling": None, "max_position_embeddings": None}
    defaults |= {} if fraction is None else {fraction_key: fraction}
    defaults |= {} if window_theta is None else {local_key: window_theta}

    def read(values: Values) -> dict[str, Any]:
        found = {} if values["rope_parameters"] is None else values["rope_parameters"]
        require(isinstance(found, dict), f"rope_parameters={found!r:.80} must be an object")
        kinds = {"full_attention", "sliding_attention"}
        nested = found if window_theta is not None and set(found) & kinds else {"full_attention": found}
        require(set(nested) <= kinds, f"rope_parameters has {', '.join(nested):.80}; it may have {', '.join(kinds)}")
        full = dict(nested.get("full_attention") or {})
        scaling = {} if values["rope_scaling"] is None else values["rope_scaling"]
        require(isinstance(scaling, dict), f"rope_scaling={scaling!r:.80} must be an object")
        base = full.pop("rope_theta", values[theta_key])
        part = 1.0 if fraction is None else full.pop("partial_rotary_factor", values[fraction_key])
        rotary = {"base": number(theta_key, base, float), "fraction": number(fraction_key, part, float)}
        if window_theta is not None:
            local = dict(nested.get("sliding_attention") or {})
            one_of("rope_type", local.pop("rope_type", "default"), "default")
            local_base = local.pop("rope_theta", values[local_key])
            require(not local, f"rope_parameters has {', '.join(local):.80} for layers with a window; remove it")
            rotary["window_base"] = number(local_key, local_base, float)
        twice = scaling and set(full) - {"rope_type"}
        require(not twice, "rope_parameters and rope_scaling both say how angles are scaled; keep one of them")
        return {"rotary": RotaryConfig(**rotary, **_read_scaling(scaling or full, values["max_position_embeddings"]))}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        r = cfg.rotary
        written: dict[str, Any] = {theta_key: r.base}
        if r.scaling != "none":
            names = SCALINGS.get(r.scaling, {})
            written["rope_scaling"] = {"rope_type": r.scaling} | {key: getattr(r, ours) for key, ours in names.items()}
        written |= {} if fraction is None else {fraction_key: r.fraction}
        return written | ({} if window_theta is None else {local_key: r.window_base})

    return Field(defaults, read, write)


def window(
    default: int | None = None, *, every: int | None = None, every_key: str | None = None, switch: bool = False
) -> Field:
    """Which layers see a window. `layer_types` says it of each; older files by one of the other keys.

    Args:
        default: tokens, where the file has none.
        every: where the file does not say otherwise, each so many-th layer sees all (Gemma); None: no layer does.
        every_key: under which the file may say so; None: it cannot.
        switch: the file has use_sliding_window, and max_window_layers, the first layers, which see all (Qwen).
    """
    named = every is not None or switch
    defaults: dict[str, Any] = {"sliding_window": default, "num_hidden_layers": None}
    defaults |= {"layer_types": None} if named else {}
    defaults |= {every_key: every, f"_{every_key}": None} if every_key else {}
    defaults |= {"use_sliding_window": False, "max_window_layers": 28} if switch else {}

    def read(values: Values) -> dict[str, Any]:
        n, size, letters = values["num_hidden_layers"], values["sliding_window"], {"sliding_attention": "w"}
        if size is None or not values.get("use_sliding_window", True):
            return {"window": None}
        number("num_hidden_layers", n)
        types = values.get("layer_types")
        if types is not None:
            fits = isinstance(types, list) and len(types) == n
            require(fits, f"layer_types has {types!r:.80}; it must have one of each of the {n} layers")
            for one in types:
                one_of("layer_types", one, "sliding_attention", "full_attention")
            pattern = "".join(letters.get(one, "f") for one in types)
        elif switch:
            first = values["max_window_layers"]
            require(type(first) is int and first >= 0, f"max_window_layers={first!r:.80} must be an integer from 0 on")
            pattern = "f" * min(first, n) + "w" * max(n - first, 0)
        else:
            step = every and number("sliding_window_pattern", values.get(every_key or "", every))
            one_of(f"_{every_key}", values.get(f"_{every_key}"), None, step)
            pattern = "w" * n if step is None else ("w" * (step - 1) + "f") * (n // step) + "w" * (n % step)
        require("w" in pattern or named, f"sliding_window={size}: no layer has one")
        return {"window": size, "window_pattern": shortest(pattern)} if "w" in pattern else {"window": None}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        letters = (cfg.window_pattern * cfg.n_layers)[: cfg.n_layers] if cfg.window else "f" * cfg.n_layers
        written: dict[str, Any] = {"sliding_window": cfg.window}
        types = {"w": "sliding_attention", "f": "full_attention"}
        written |= {"layer_types": [types[letter] for letter in letters]} if named else {}
        full = len(letters) - len(letters.lstrip("f"))
        return written | ({"use_sliding_window": bool(cfg.window), "max_window_layers": full} if switch else {})

    return Field(defaults, read, write)


def shortest(pattern: str) -> str:
    """The shortest beginning that, repeated, gives the pattern.

    >>> shortest("wwfwwfww")
    'wwf'
    """
    return next(pattern[:size] for size in range(1, len(pattern) + 1) if pattern.startswith(pattern[size:]))


COMMON = (  # of all families that do not say otherwise
    only("is_encoder_decoder", False), only("add_cross_attention", False), only("cross_attention_hidden_size", None),
    only("tie_encoder_decoder", False), only("is_decoder", False), only("pruned_heads", None, {}),
    only("quantization_config", None),
)  # fmt: skip


def read_fields(fields: tuple[Field, ...], values: Values) -> dict[str, Any]:
    """Keyword arguments of ModelConfig from a config.json.

    Raises:
        InputError: a key is not known to any field, or its value is not honoured.
    """
    own = {key for field in fields for key in field.defaults}
    fields = (*(field for field in COMMON if not own & field.defaults.keys()), *fields)
    known = {key: default for field in reversed(fields) for key, default in field.defaults.items()}
    unknown = sorted(set(values) - set(known) - WITHOUT_EFFECT)
    named = ", ".join(f"{key}={values[key]!r:.40}" for key in unknown[:3])
    require(not unknown, f"{named:.200} has no counterpart here; remove it from the file only if it has no effect")
    n = values.get("num_hidden_layers")
    fits = n is None or (type(n) is int and 0 < n <= MAX_LAYERS)
    require(fits, f"num_hidden_layers={n!r:.40} must be from 1 to {MAX_LAYERS}")
    found: dict[str, Any] = {}
    for field in fields:
        found |= field.read({key: values.get(key, known[key]) for key in field.defaults})
    for name, value in found.items():
        require(
            type(value) is not int or value < 2**31, f"{name}={value} is more than a model has; fetch the file again"
        )
    return found


def read_model_config(base: dict[str, Any], fields: tuple[Field, ...], values: Values, where: str) -> ModelConfig:
    """The ModelConfig that a config.json describes.

    Raises:
        InputError: as `read_fields`, or the values break a rule of ModelConfig.
    """
    try:
        return ModelConfig(**(base | read_fields(fields, values)))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
