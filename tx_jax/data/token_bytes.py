"""What each token adds to a text, in bytes: what automata over a vocabulary are made of.

A token may hold half of a character, so that its own text is not what it adds.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from tx_jax.data.subwords import SentencePieceTokenizer, SubwordTokenizer, TiktokenTokenizer
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that stand for themselves in GPT-2's
OTHERS = [i for i in range(256) if i not in PRINTABLE]  # names of tokens; the others are moved behind Latin-1, in order
BYTE_OF = {chr(i): i for i in PRINTABLE} | {chr(256 + n): i for n, i in enumerate(OTHERS)}
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # how SentencePiece writes a space


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each id adds to a text; nothing, if it is a special token or stands for none.

    >>> token_bytes(CharTokenizer("aé"))
    [b'a', b'\\xc3\\xa9']
    """
    return READERS[type(tokenizer)](tokenizer)


def _of_subwords(tokenizer: SubwordTokenizer) -> list[bytes]:
    decoder = json.dumps(json.loads(tokenizer.json).get("decoder"))
    read = next((read for kind, read in BY_DECODER.items() if f'"{kind}"' in decoder), _piece)
    hidden = set(tokenizer.special_tokens.values())
    return [b"" if i in hidden else read(tokenizer.token(i)) for i in range(tokenizer.vocab_size)]


def _of_pieces(tokenizer: SentencePieceTokenizer) -> list[bytes]:
    hidden = set(tokenizer.special_tokens.values())
    unknown = {tokenizer.token_id("<unk>")}
    return [
        b"" if i in hidden else tokenizer.decode([i]).encode() if i in unknown else _piece(tokenizer.token(i))
        for i in range(tokenizer.vocab_size)
    ]


def _piece(name: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, " ").encode("utf-8")


def _byte_level(name: str) -> bytes:
    """A token that was added by hand may hold other characters: it is its own text."""
    return bytes(BYTE_OF[c] for c in name) if set(name) <= BYTE_OF.keys() else name.encode("utf-8")


def _word_piece(name: str) -> bytes:
    return (name[2:] if name.startswith("##") else f" {name}").encode("utf-8")


BY_DECODER: dict[str, Callable[[str], bytes]] = {"ByteLevel": _byte_level, "WordPiece": _word_piece}
READERS: dict[type, Callable[[Any], list[bytes]]] = {
    ByteTokenizer: lambda tokenizer: [bytes([i]) for i in range(256)],
    CharTokenizer: lambda tokenizer: [c.encode("utf-8", "surrogatepass") for c in tokenizer.characters],
    SentencePieceTokenizer: _of_pieces,
    SubwordTokenizer: _of_subwords,
    TiktokenTokenizer: lambda tokenizer: [*tokenizer.pieces(range(tokenizer.vocab_size), False)],
}
