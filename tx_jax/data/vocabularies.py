"""Tokenizers built from the parts of a vocabulary: GPT-2's two files, what a GGUF file holds, and our own kinds.

Each becomes the `tokenizer.json` or SentencePiece model that the publisher of the vocabulary would write.
"""

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tx_jax.data.byte_ranks import CL100K
from tx_jax.data.libraries import check_ends, one_line
from tx_jax.data.subwords import SentencePieceTokenizer, SubwordTokenizer
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer, utf8
from tx_jax.errors import require

GPT2_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GPT2_END = "<|endoftext|>"
BYTES = GPT2_WORDS | {"use_regex": False}


def _words(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


class Pre(NamedTuple):
    """How a family of byte-level BPE models cuts a text into the words in which it merges."""

    steps: tuple[Mapping[str, object], ...]  # pre-tokenizers of a tokenizer.json, one after the other
    normalizer: Mapping[str, object] | None = None
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges
    add_bos: bool = False  # where the file does not say


# Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe and llama_vocab::impl::load, and, where they differ (Qwen's
# normalizer), the tokenizer.json of openai-community/gpt2, meta-llama/Meta-Llama-3-8B, Qwen/Qwen2-0.5B and
# HuggingFaceTB/SmolLM2-135M.
PRE = {
    "gpt-2": Pre((GPT2_WORDS,)),
    "llama-bpe": Pre((_words(CL100K), BYTES), ignore_merges=True, add_bos=True),
    "qwen2": Pre((_words(CL100K.replace(r"\p{N}{1,3}", r"\p{N}")), BYTES), normalizer={"type": "NFC"}),
    "smollm": Pre(({"type": "Digits", "individual_digits": True}, GPT2_WORDS)),
    "default": Pre(
        (
            _words(r"[\p{P}\$\+<=>\^~\|]+"),
            _words(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            _words(r"\p{N}+"),
            _words("[0-9][0-9][0-9]"),
            BYTES,
        )
    ),
}


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    *,
    pre: str = "gpt-2",
    special: Mapping[str, int] | None = None,
    words: Mapping[str, int] | None = None,
    bos: str | None = None,
) -> str:
    """The `tokenizer.json` of a byte-level BPE.

    Args:
        vocab: ids of tokens, whose bytes are written as GPT-2 writes them ("Ġ" for a space).
        merges: pairs of tokens, the first to be merged first.
        pre: how a text is cut into words, a row of PRE.
        special: tokens that are no text.
        words: tokens that are text and never cut.
        bos: the special token before a text of its own.
    """
    cut = PRE[pre]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [(i, name, True) for name, i in (special or {}).items()]
    tokens += [(i, name, False) for name, i in (words or {}).items()]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": cut.ignore_merges}
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": no_text} for i, name, no_text in sorted(tokens)
        ],
        "normalizer": cut.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut.steps},
        "post_processor": None if bos is None else _template(bos, vocab[bos]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model | {"vocab": dict(vocab), "merges": [list(pair) for pair in merges]},
    }
    return json.dumps(fields, ensure_ascii=False)


def _template(bos: str, bos_id: int) -> dict[str, object]:
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    known = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    pair = [first, text, second]
    return {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": known}


def from_gpt2(
    vocab: str,
    merges: str,
    *,
    special: Mapping[str, int] | None = None,
    words: Mapping[str, int] | None = None,
    bos: str | None = None,
) -> SubwordTokenizer:
    """GPT-2's tokenizer, from the contents of `vocab.json` and `merges.txt` (or `encoder.json` and `vocab.bpe`).

    `special`, `words` and `bos` are those of `byte_level_bpe`; `special` and `words` may add to the vocabulary.

    Raises:
        InputError: they are not such files, or a token that is added has the id of another.
    """
    rule, remedy = (
        "vocab.json and merges.txt are not a vocabulary of GPT-2's kind",
        "take both files from the publisher",
    )
    lines = [line for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
    with one_line(rule, remedy):
        ids = json.loads(vocab)
    ok = isinstance(ids, dict) and all(type(i) is int and i >= 0 for i in ids.values())
    require(ok, f"{rule} (no ids by token); {remedy}")
    pairs = [line.split(maxsplit=2) for line in lines]
    wrong = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None)
    require(wrong is None, f"{rule} (no pair: {wrong!r:.40}); {remedy}")
    names = {i: name for name, i in ids.items()}
    added = {**(special or {}), **(words or {})}
    for name, i in added.items():
        free = i >= 0 and ids.get(name, i) == i and names.get(i, name) == name
        require(free, f"the added token {name!r:.40} has id {i}, which is another's in vocab.json; {remedy}")
    vocabulary = ids | added
    require(bos is None or bos in vocabulary, f"bos_token={bos!r:.40} is no token of vocab.json; {remedy}")
    end = vocabulary.get(GPT2_END)
    special = dict(special or {}) | ({} if end is None else {GPT2_END: end})
    words = {name: i for name, i in (words or {}).items() if name not in special}
    tokenizer = SubwordTokenizer(byte_level_bpe(vocabulary, pairs, special=special, words=words, bos=bos))
    return tokenizer if end is None else SubwordTokenizer(tokenizer.json, bos_id=end, eos_ids=(end,))


def to_hugging_face(tokenizer: CharTokenizer | ByteTokenizer) -> SubwordTokenizer:
    """The same ids of the same text, as a `tokenizer.json` that other libraries read.

    A character that the tokenizer does not know is an error here, and left out by other libraries.

    >>> to_hugging_face(CharTokenizer("ab")).encode("ba").tolist()
    [1, 0]
    """
    return SubwordTokenizer(_CONVERTED[type(tokenizer)](tokenizer))


def _of_bytes(tokenizer: ByteTokenizer) -> str:
    fields = json.loads(byte_level_bpe({name: i for i, name in enumerate(_byte_names())}, []))
    return json.dumps(fields | {"pre_tokenizer": BYTES}, ensure_ascii=False)


def _of_characters(tokenizer: CharTokenizer) -> str:
    fields = json.loads(byte_level_bpe({}, []))
    vocab = {character: i for i, character in enumerate(tokenizer.characters)}
    # a character that is no token has to be some token's: one that no text makes keeps it an error
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "no character"}
    parts = {"pre_tokenizer": _words(r"[\s\S]"), "decoder": {"type": "Fuse"}, "model": model}
    return json.dumps(fields | parts, ensure_ascii=False)


_CONVERTED = {ByteTokenizer: _of_bytes, CharTokenizer: _of_characters}


def _byte_names() -> list[str]:
    """The character that stands for each byte in a vocabulary. Source: GPT-2, encoder.py, bytes_to_unicode."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return [chr(i if i in shown else next(hidden)) for i in range(256)]


def from_gguf(metadata: Mapping[str, object]) -> SubwordTokenizer | SentencePieceTokenizer:
    """The tokenizer inside a GGUF file, from the file's metadata: plain Python values by key.

    Source: ggml, docs/gguf.md, "Tokenizer".

    Raises:
        InputError: a key is missing or holds something else, or the kind of tokenizer is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    rule = f"must be one of {', '.join(_KINDS)}; use the model's tokenizer.json"
    require(isinstance(kind, str) and kind in _KINDS, f"tokenizer.ggml.model={kind!r:.40} {rule}")
    return _KINDS[str(kind)](metadata)


def _value(metadata: Mapping[str, object], key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.{key}")
    ok = value is None or type(value) is kind
    require(ok, f"tokenizer.{key}={value!r:.40} must be {kind.__name__}; convert the model to GGUF again")
    return default if value is None else value


def _list(metadata: Mapping[str, object], key: str, kind: type, length: int | None = None) -> list[Any]:
    values: list[Any] = _value(metadata, f"ggml.{key}", list, [])
    ok = values and all(type(value) is kind for value in values) and len(values) == (length or len(values))
    require(
        ok, f"tokenizer.ggml.{key} must be a list of {length or ''} {kind.__name__}; convert the model to GGUF again"
    )
    return values


def _ends(metadata: Mapping[str, object], size: int) -> tuple[int | None, tuple[int, ...]]:
    bos, eos = (_value(metadata, f"ggml.{name}_token_id", int) for name in ("bos", "eos"))
    check_ends(size, (bos, eos))
    return bos, () if eos is None else (eos,)


TURN = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")  # what the names of special tokens look like
MAX_SCORE = 3.4e38  # of float32
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _, BYTE = range(1, 7)  # token types of GGUF, which are SentencePiece's


def _from_gguf_bpe(metadata: Mapping[str, object]) -> SubwordTokenizer:
    pre = _value(metadata, "ggml.pre", str)
    rule = f"must be one of {', '.join(PRE)}, or the words in which to merge are not known"
    require(pre in PRE, f"tokenizer.ggml.pre={pre!r:.40} {rule}; use the model's tokenizer.json")
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int, len(tokens))
    merges = [merge.split(" ") for merge in _list(metadata, "merges", str)]
    require(all(len(pair) == 2 for pair in merges), "tokenizer.ggml.merges must be pairs; convert the model again")
    bos_id, eos_ids = _ends(metadata, len(tokens))
    add_bos = _value(metadata, "ggml.add_bos_token", bool, PRE[pre].add_bos)
    of_type = {kind: {tokens[i]: i for i, its in enumerate(types) if its == kind} for kind in (CONTROL, USER_DEFINED)}
    content = byte_level_bpe(
        {token: i for i, token in enumerate(tokens)},
        merges,
        pre=pre,
        special=of_type[CONTROL],
        words=of_type[USER_DEFINED],
        bos=tokens[bos_id] if add_bos and bos_id is not None else None,
    )
    return SubwordTokenizer(content, bos_id, eos_ids, _value(metadata, "chat_template", str))


def _from_gguf_sentencepiece(metadata: Mapping[str, object]) -> SentencePieceTokenizer:
    tokens = _list(metadata, "tokens", str)
    scores, types = _list(metadata, "scores", float, len(tokens)), _list(metadata, "token_type", int, len(tokens))
    ok = all(abs(score) <= MAX_SCORE for score in scores)  # not a number is none, either
    require(ok, "tokenizer.ggml.scores must be finite numbers of 32 bits; convert the model to GGUF again")
    bos_id, eos_ids = _ends(metadata, len(tokens))
    template = _value(metadata, "chat_template", str)
    # Gemma's turns are of the type that is found in every text, as <b> and the like are: the template tells which.
    turns = [i for i, kind in enumerate(types) if kind == USER_DEFINED and TURN.fullmatch(tokens[i])]
    special = tuple((tokens[i], i) for i in turns if template and tokens[i] in template)
    pieces = b"".join(
        _field(1, _field(1, utf8(token)) + _field(2, score) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), 0)
    trainer = _field(3, 2) + _field(35, int(BYTE in types)) + _field(40, unknown)  # 2: BPE
    prefix = _value(metadata, "ggml.add_space_prefix", bool, True)
    normalizer = _field(1, b"identity") + _field(3, int(prefix)) + _field(4, 0)  # spaces stay as they are
    return SentencePieceTokenizer(
        pieces + _field(2, trainer) + _field(3, normalizer),
        bos_id,
        eos_ids,
        template,
        add_bos=_value(metadata, "ggml.add_bos_token", bool, True) and bos_id is not None,
        add_eos=_value(metadata, "ggml.add_eos_token", bool, False) and bool(eos_ids),
        special=special,
    )


def _field(number: int, value: bytes | int | float) -> bytes:
    """One field of a protocol buffer: SentencePiece's own writer would need one exact version of the package protobuf.

    Source: sentencepiece_model.proto; protobuf.dev, "Encoding".
    """
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


_KINDS = {"gpt2": _from_gguf_bpe, "llama": _from_gguf_sentencepiece}
