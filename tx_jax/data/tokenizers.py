"""Text to token ids and back: the first and the last station of both journeys.

A tokenizer is a frozen value, equal to the one that its file gives back, so that a run directory can say
exactly which text an id stands for.
"""

import codecs
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, SupportsIndex

import numpy as np
from jaxtyping import Array, Int32, Int64, Integer

from tx_jax.errors import InputError, require

FILE = "tokenizer.json"
Ids = Sequence[SupportsIndex] | Integer[Array | np.ndarray, "..."]


def _save(self: "Tokenizer", directory: str | os.PathLike[str]) -> None:
    """Write `tokenizer.json` in `directory`, which is made if need be."""
    content = json.dumps({"kind": self.kind} | dataclasses.asdict(self)) + "\n"
    replace_file(Path(directory) / FILE, content.encode("utf-8"))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, and its directory if need be; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def utf8(text: str) -> bytes:
    """The text in UTF-8.

    Raises:
        InputError: the text holds half of a surrogate pair, which UTF-8 cannot write.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"character {text[error.start]!r} at index {error.start}"
        raise InputError(f"{where} is a lone surrogate, not Unicode text; leave it out") from error


def checked_ids(ids: Ids, vocab_size: int) -> Int64[np.ndarray, " T"]:
    """The ids as one row of integers.

    Raises:
        InputError: an id is negative, or vocab_size or more, or ids are not one row.
    """
    ids = np.asarray(ids, np.int64)
    require(ids.ndim == 1, f"ids{ids.shape} must be one row of ids; decode the rows of a batch one by one")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if wrong.size:
        where = f"id {ids[wrong[0]]} at index {wrong[0]}"
        raise InputError(f"{where} stands for no text; the ids of this tokenizer are 0 to {vocab_size - 1}")
    return ids


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8 as ids: any text, in any language, and nothing to train.

    >>> ByteTokenizer().encode("né").tolist()
    [110, 195, 169]
    """

    kind: ClassVar[str] = "byte"
    vocab_size: ClassVar[int] = 256  # ids
    save = _save

    @classmethod
    def train(cls, text: str) -> "ByteTokenizer":
        """The one tokenizer of bytes, whatever the text."""
        return cls()

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """The id of each byte of the text.

        Raises:
            InputError: the text holds half of a surrogate pair, which UTF-8 cannot write.
        """
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """The text of the ids, with U+FFFD where they are not UTF-8.

        Raises:
            InputError: an id is not a byte, or ids are not one row.
        """
        return checked_ids(ids, 256).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """The text of the ids as they come, each character once it is whole; joined, it is what `decode` gives.

        >>> list(ByteTokenizer().stream([110, 195, 169]))
        ['n', 'é']
        """
        pieces = (checked_ids([i], 256).astype(np.uint8).tobytes() for i in ids)
        return codecs.iterdecode(pieces, "utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """The characters of one text as ids, in the order of their code points.

    >>> CharTokenizer.train("abba").encode("ba").tolist()
    [1, 0]
    """

    characters: str  # the i-th is the text of id i
    kind: ClassVar[str] = "char"
    save = _save

    def __post_init__(self) -> None:
        given = self.characters
        rule = "must be one or more characters, distinct and sorted; use CharTokenizer.train(text)"
        require(given and given == "".join(sorted(set(given))), f"characters={given!r:.40} {rule}")

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The tokenizer of the characters that occur in the text.

        Raises:
            InputError: the text is empty.
        """
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.characters)

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """The id of each character of the text.

        Raises:
            InputError: a character did not occur in the training text.
        """
        known, given = _code_points(self.characters), _code_points(text)
        ids = np.searchsorted(known, given).clip(max=len(known) - 1).astype(np.int32)
        wrong = np.flatnonzero(known[ids] != given)
        if wrong.size:
            where = f"character {text[wrong[0]]!r} at index {wrong[0]}"
            rule = f"is not among the {len(known)} of this tokenizer"
            raise InputError(f"{where} {rule}; leave it out, or use the tokenizer byte")
        return ids

    def decode(self, ids: Ids) -> str:
        """The text of the ids.

        Raises:
            InputError: an id is negative, or vocab_size or more, or ids are not one row.
        """
        known = _code_points(self.characters)
        return known[checked_ids(ids, len(known))].tobytes().decode("utf-32-le", "surrogatepass")

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """The text of the ids as they come, a character each; joined, it is what `decode` gives."""
        return (self.decode([i]) for i in ids)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


Tokenizer = CharTokenizer | ByteTokenizer
TOKENIZERS = {kind.kind: kind for kind in (CharTokenizer, ByteTokenizer)}


def load_saved(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote in the directory.

    Raises:
        InputError: its `tokenizer.json` cannot be read, or is not one that `save` wrote.
    """
    path = Path(directory) / FILE
    remedy = "give the run directory of a finished or running train.py"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return TOKENIZERS[fields.pop("kind")](**fields)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); {remedy}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # each is a way for JSON to be something else
        raise InputError(f"{path} is not a tokenizer ({error!r:.80}); {remedy}") from error
