"""The tokenizer of a directory, as models are published on Hugging Face, and of a run directory of ours."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tx_jax.config_json import read_bytes, read_object
from tx_jax.data.byte_ranks import CL100K, TiktokenTokenizer
from tx_jax.data.libraries import CONFIG
from tx_jax.data.subwords import SentencePieceTokenizer, Subwords, SubwordTokenizer
from tx_jax.data.tokenizers import Tokenizer, load_saved
from tx_jax.data.vocabularies import GPT2_END, from_gpt2
from tx_jax.errors import InputError, require

AnyTokenizer = Subwords | Tokenizer
Config = Mapping[str, Any]
LIMIT = 40_000_000  # bytes of a vocabulary; Gemma 3's tokenizer.json has 33 million, and 1.9 million values
MAX_JSON = 2**21  # values of a tokenizer.json
LINES = (2**19, b"\n")  # a merge, or a rank, is a line
PIECES = (2**20, b"\n")  # a piece of a SentencePiece model begins with this byte, and its text also
CONFIG_LIMIT = 16_000_000  # bytes of what describes its tokens; where tens of thousands are added, some millions
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
GPT2_ONLY = {  # key of tokenizer_config.json: what it says of GPT-2's kind
    "tokenizer_class": (None, "GPT2Tokenizer", "GPT2TokenizerFast"),
    "add_prefix_space": (None, False),
    "add_eos_token": (None, False),
}
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # Llama 3's first release calls its ranks tokenizer.model


def find_tokenizer(directory: str | os.PathLike[str]) -> AnyTokenizer | None:
    """The tokenizer of the directory, from the first of FILES that is there; None: none is.

    What begins and ends a text, and the chat template, are read from tokenizer_config.json, special_tokens_map.json,
    generation_config.json and chat_template.jinja.

    Raises:
        InputError: one cannot be read or is not what its name says.
    """
    home = Path(directory)
    for names, read in _READERS.items():
        found = [sorted(home.glob(name)) for name in names]
        if all(found):
            return read(home, *(paths[0] for paths in found))
    return None


def fingerprint(tokenizer: AnyTokenizer) -> str:
    """The SHA-256 of a tokenizer: equal ones have the same."""
    return hashlib.sha256(repr((type(tokenizer).__name__, dataclasses.astuple(tokenizer))).encode()).hexdigest()


def _text(path: Path, *count: Any, limit: int = LIMIT) -> str:
    try:
        return read_bytes(path, limit, *count).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 at byte {error.start}; take the file from its publisher again"
        ) from error


def _json(path: Path, *limit: int) -> Config:
    return read_object(path, *limit) if path.exists() else {}


def _config(home: Path) -> Config:
    """What the files beside a vocabulary say, in the keys of tokenizer_config.json, which has the last word."""
    generation = _json(home / "generation_config.json")
    config = {**_json(home / "special_tokens_map.json"), **_json(home / CONFIG, CONFIG_LIMIT)}
    config["eos_token_id"] = [*_as_list(config.get("eos_token_id")), *_as_list(generation.get("eos_token_id"))]
    template = home / "chat_template.jinja"
    return config | ({"chat_template": _text(template, limit=CONFIG_LIMIT)} if template.exists() else {})


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _template(config: Config) -> str | None:
    given = config.get("chat_template")
    named = {entry.get("name"): entry.get("template") for entry in _as_list(given) if isinstance(entry, dict)}
    template = named.get("default") if named else given
    require(template is None or isinstance(template, str), f"chat_template={given!r:.40} must be text or named texts")
    return template


def _name(config: Config, key: str) -> str | None:
    given = config.get(key)
    name = given.get("content") if isinstance(given, dict) else given
    require(name is None or isinstance(name, str), f"{key}={given!r:.40} in {CONFIG} must be the name of a token")
    return name


def _added(config: Config) -> tuple[tuple[str, int, Config], ...]:
    """The tokens that tokenizer_config.json adds to a vocabulary: name, id, flags."""
    given = config.get("added_tokens_decoder", {})
    try:
        return tuple((str(token["content"]), int(i), dict(token)) for i, token in given.items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"added_tokens_decoder={given!r:.40} in {CONFIG} must be tokens by id") from error


def _special(config: Config) -> tuple[tuple[str, int], ...]:
    return tuple((name, i) for name, i, flags in _added(config) if flags.get("special"))


def _ends(config: Config, token_id: Callable[[str], int | None]) -> dict[str, Any]:
    """The fields of a tokenizer that say which ids begin and end a text, and how a chat is written."""
    bos, eos = (_name(config, key) for key in ("bos_token", "eos_token"))
    further = config["eos_token_id"]
    require(all(type(i) is int for i in further), f"eos_token_id={further!r:.40} must be an id or a list of ids")
    ends = [i for i in ([] if eos is None else [token_id(eos)]) + further if i is not None]
    begins = config.get("bos_token_id", None if bos is None else token_id(bos))
    require(begins is None or type(begins) is int, f"bos_token_id={begins!r:.40} must be an id")
    return {"bos_id": begins, "eos_ids": tuple(dict.fromkeys(ends)), "chat_template": _template(config)}


def _read_json(home: Path, path: Path) -> SubwordTokenizer | Tokenizer:
    content = _text(path, MAX_JSON)
    if '"kind"' in content[:20]:  # ours, which begins with it
        return load_saved(home)
    config = _config(home)
    roles = tuple((key, name) for key in ROLES if (name := _name(config, key)) is not None)
    return SubwordTokenizer(content, **_ends(config, SubwordTokenizer(content).token_id), roles=roles)


def _read_gpt2(home: Path, vocab: Path, merges: Path) -> SubwordTokenizer:
    config = _config(home)
    rule = f"is not honoured for {vocab.name} with {merges.name}, which are read as GPT-2's; give tokenizer.json"
    for key, honoured in GPT2_ONLY.items():
        require(config.get(key) in honoured, f"{key}={config.get(key)!r:.40} in {CONFIG} {rule}")
    for name, _, flags in _added(config):
        flag = next((flag for flag in ("lstrip", "rstrip", "single_word") if flags.get(flag)), None)
        require(flag is None, f"{flag} of the token {name!r:.40} in {CONFIG} {rule}")
    special = dict(_special(config))
    words = {name: i for name, i, _ in _added(config) if name not in special}
    bos = (_name(config, "bos_token") or GPT2_END) if _flag(config, "add_bos_token", False) else None
    tokenizer = from_gpt2(_text(vocab), _text(merges, *LINES), special=special, words=words, bos=bos)
    given = {key: value for key, value in _ends(config, tokenizer.token_id).items() if value not in (None, ())}
    ends = {"bos_id": tokenizer.bos_id, "eos_ids": tokenizer.eos_ids} | given
    return SubwordTokenizer(tokenizer.json, **ends)


def _read_model(home: Path, path: Path) -> SentencePieceTokenizer | TiktokenTokenizer:
    content, config = read_bytes(path, LIMIT, *PIECES), _config(home)
    if TIKTOKEN_LINE.match(content):
        return _read_tiktoken(home, path)
    known = SentencePieceTokenizer(content).special_tokens.items()
    special = tuple(token for token in _special(config) if token not in known)
    plain = SentencePieceTokenizer(content, special=special)
    ends = _ends(config, plain.token_id)
    bos, eos = plain.own_ends  # for a directory that holds nothing but the model
    bos_id = ends["bos_id"] if "bos_token" in config else bos
    eos_ids = ends["eos_ids"] if "eos_token" in config or eos is None else (eos, *ends["eos_ids"])
    # LLaMA's models have a token to begin a text and put it there; T5's have none and put one at the end
    add_bos = _flag(config, "add_bos_token", bos_id is not None)
    add_eos = _flag(config, "add_eos_token", bos_id is None and bool(eos_ids))
    fields = {"bos_id": bos_id, "eos_ids": tuple(dict.fromkeys(eos_ids)), "chat_template": ends["chat_template"]}
    return SentencePieceTokenizer(content, special=special, add_bos=add_bos, add_eos=add_eos, **fields)


def _flag(config: Config, key: str, default: bool) -> bool:
    given = config.get(key)
    require(given is None or isinstance(given, bool), f"{key}={given!r:.40} in {CONFIG} must be true or false")
    return default if given is None else given


def _read_tiktoken(home: Path, path: Path) -> TiktokenTokenizer:
    config, ranks = _config(home), _text(path, *LINES)
    special, pattern = _special(config), config.get("pattern", CL100K)  # a key of ours
    require(isinstance(pattern, str), f"pattern={pattern!r:.40} in {CONFIG} must be a regular expression")
    return TiktokenTokenizer(ranks, pattern, special, **_ends(config, dict(special).get))


_READERS: dict[tuple[str, ...], Callable[..., AnyTokenizer]] = {
    ("tokenizer.json",): _read_json,  # also our own
    ("tokenizer.model",): _read_model,
    ("spiece.model",): _read_model,
    ("vocab.json", "merges.txt"): _read_gpt2,
    ("encoder.json", "vocab.bpe"): _read_gpt2,
    ("*.tiktoken",): _read_tiktoken,
}
FILES = ", ".join(" with ".join(names) for names in _READERS)
