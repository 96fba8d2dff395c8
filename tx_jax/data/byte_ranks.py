"""Byte-level BPE by rank: the kind of tokenizer that a `.tiktoken` file holds, see `data.subwords`."""

import base64
import codecs
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from tx_jax.data.libraries import AGAIN, added, check_ends, config_of, each, one_line, package, row, write_vocabulary
from tx_jax.data.tokenizers import Ids, checked_ids, utf8
from tx_jax.errors import require

# How cl100k_base and Llama 3 cut a text into words before they merge bytes.
# Source: tiktoken_ext/openai_public.py; llama3, llama/tokenizer.py, Tokenizer.pat_str.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class TiktokenTokenizer:
    """What a `.tiktoken` file says: byte-level BPE by rank, of Llama 3's first release, Qwen's and OpenAI's models."""

    ranks: str = dataclasses.field(repr=False)  # the content of the file: a token in base 64, a space, its id; by line
    pattern: str = CL100K  # a regular expression of the words in which bytes are merged
    special: tuple[tuple[str, int], ...] = ()  # tokens that are no text
    bos_id: int | None = None  # begins a text; `add_special_tokens=True` puts it before
    eos_ids: tuple[int, ...] = ()  # each ends one; the first is the one to write
    chat_template: str | None = dataclasses.field(default=None, repr=False)  # Jinja, for data.chat

    def __post_init__(self) -> None:
        check_ends(self.vocab_size, (self.bos_id, *self.eos_ids))

    @functools.cached_property
    def _tokens(self) -> Mapping[int, bytes]:
        with one_line("the .tiktoken file is malformed", AGAIN):
            lines = (line.split() for line in self.ranks.splitlines() if line)
            return {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}

    @functools.cached_property
    def _encoding(self) -> Any:
        ranks, special = {token: i for i, token in self._tokens.items()}, dict(self.special)
        whole = (
            {bytes([i]) for i in range(256)} <= ranks.keys() and min(self._tokens) >= 0 and max(self._tokens) < 2**31
        )
        require(whole, f"the .tiktoken file lacks a byte or has an id that is no int32; {AGAIN}")
        free = all(0 <= i < 2**31 and i not in self._tokens for i in special.values())
        require(free, f"special={self.special!r:.60} must be ids of their own, of int32; {AGAIN}")
        library = package("tiktoken", "tiktoken")
        with one_line("the .tiktoken file and pattern are no vocabulary", AGAIN):
            return library.Encoding("", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of the tokens that are no text, by name."""
        return dict(self.special)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; an id that stands for no token, between the others, is no text."""
        return self._encoding.max_token_value + 1

    @functools.cached_property
    def _names(self) -> Mapping[int, str]:
        return {i: name for name, i in self.special}

    def token(self, i: int) -> str:
        """The name of a token in the file."""
        return self._names.get(i) or self._tokens.get(i, b"").decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        """The id of a special token by its name; None: there is none."""
        return self.special_tokens.get(name)

    def encode(self, text: str, *, special: bool = False, add_special_tokens: bool = False) -> Int32[np.ndarray, " T"]:
        """The ids of the text; the arguments are those of `SubwordTokenizer.encode`.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        utf8(text)
        allowed = set(self.special_tokens) if special else set()
        before = [self.bos_id] if add_special_tokens and self.bos_id is not None else []
        with one_line("the tokenizer cannot encode the text", "give it in smaller parts"):
            return row([*before, *self._encoding.encode(text, allowed_special=allowed, disallowed_special=())])

    def pieces(self, ids: Iterable[int], special: bool) -> Iterator[bytes]:
        """What each id adds to a text; special tokens their names, if asked for, or nothing."""
        names = {i: name.encode("utf-8") for i, name in self._names.items()} if special else {}
        return (names.get(i, self._tokens.get(i, b"")) for i in ids)

    def decode(self, ids: Ids, *, special: bool = False) -> str:
        """The text of the ids, with U+FFFD where they are not UTF-8, and names of special tokens only if asked for.

        Raises:
            InputError: an id is negative, or vocab_size or more, or ids are not one row.
        """
        given = checked_ids(ids, self.vocab_size).tolist()
        return b"".join(self.pieces(given, special)).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """The text of the ids as they come, each character once it is whole; joined, it is what `decode` gives."""
        return codecs.iterdecode(self.pieces(each(ids, self.vocab_size), False), "utf-8", errors="replace")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.tiktoken` and `tokenizer_config.json`, which `find_tokenizer` reads.

        Raises:
            InputError: the directory holds a tokenizer of another kind.
        """
        config = {**config_of(self), "pattern": self.pattern, **added(self.special)}
        write_vocabulary(directory, "tokenizer.tiktoken", self.ranks.encode("utf-8"), config)
