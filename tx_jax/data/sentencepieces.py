"""The tokenizer of a SentencePiece model, whose pieces hold the spaces of a text: LLaMA 1 and 2, Mistral, Gemma, T5.

Its library finds some pieces in every text, special ones too; here a text is cut so that none of those is found.
"""

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from tx_jax.data.libraries import (
    AGAIN,
    added,
    check_ends,
    config_of,
    each,
    one_line,
    package,
    row,
    split_at,
    stream_by_windows,
    write_vocabulary,
)
from tx_jax.data.tokenizers import Ids, checked_ids, utf8
from tx_jax.errors import require


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """What a SentencePiece model says: `tokenizer.model` of LLaMA 1 and 2, Mistral, Gemma; `spiece.model` of T5."""

    model: bytes = dataclasses.field(repr=False)  # the content of the file
    bos_id: int | None = None  # begins a text
    eos_ids: tuple[int, ...] = ()  # each ends one; the first is the one to write
    chat_template: str | None = dataclasses.field(default=None, repr=False)  # Jinja, for data.chat
    add_bos: bool = False  # `add_special_tokens=True` puts bos_id before a text
    add_eos: bool = False  # and the first of eos_ids after it
    special: tuple[tuple[str, int], ...] = ()  # tokens that are no text, besides the control tokens of the model

    def __post_init__(self) -> None:
        check_ends(self.vocab_size, (self.bos_id, *self.eos_ids))
        require(self.bos_id is not None or not self.add_bos, "add_bos=True needs a bos_id")
        require(self.eos_ids or not self.add_eos, "add_eos=True needs eos_ids")

    @functools.cached_property
    def _processor(self) -> Any:
        processor = package("sentencepiece", "sentencepiece").SentencePieceProcessor()
        with one_line("the SentencePiece model is malformed", AGAIN):
            processor.LoadFromSerializedProto(self.model)
            processor.encode("")  # fails where there is no model, for which an empty file passes
        return processor

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of the tokens that are no text, by name."""
        control = (i for i in range(self._processor.vocab_size()) if self._processor.is_control(i))
        return {self._processor.id_to_piece(i): i for i in control} | dict(self.special)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; an id that stands for no token, between the others, is no text."""
        return max(self._processor.vocab_size(), 1 + max(self.special_tokens.values(), default=-1))

    @property
    def own_ends(self) -> tuple[int | None, int | None]:
        """The ids with which the model itself says that a text begins and ends; None: with none."""
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        return bos if bos >= 0 else None, eos if eos >= 0 else None

    @functools.cached_property
    def _names(self) -> Mapping[int, str]:
        return {i: name for name, i in self.special_tokens.items()}

    def token(self, i: int) -> str:
        """The name of a token in the file."""
        known = i < self._processor.vocab_size()
        return self._names.get(i) or (self._processor.id_to_piece(i) if known else "")

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name in the file; None: there is none."""
        i = self._processor.piece_to_id(name)
        return self.special_tokens.get(name, i if self.token(i) == name else None)

    def encode(self, text: str, *, special: bool = False, add_special_tokens: bool = False) -> Int32[np.ndarray, " T"]:
        """The ids of the text; the arguments are those of `SubwordTokenizer.encode`.

        Each stretch of text between special tokens is encoded alone, with the leading space that a text is given.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        utf8(text)
        known = self.special_tokens if special else {}
        pieces = [piece for piece in split_at(text, known) if piece]
        ids = [[known[piece]] if piece in known else self._processor.encode(piece) for piece in pieces]
        if not special and self._forged(*ids):  # by pieces that the library finds in every text: cut their names
            cut = re.split("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in self.special_tokens), text)
            ids = [self._processor.encode(piece) for piece in cut]
            forged = self._forged(*ids)
            require(not forged, f"the text holds {forged}, which this tokenizer cannot read as text; leave it out")
        before = [self.bos_id] if add_special_tokens and self.add_bos and self.bos_id is not None else []
        after = self.eos_ids[:1] if add_special_tokens and self.add_eos else []
        return row(itertools.chain(before, *ids, after))

    def _forged(self, *ids: Iterable[int]) -> str:
        return ", ".join(sorted({self._names[i] for i in itertools.chain(*ids) if i in self._names}))

    def decode(self, ids: Ids, *, special: bool = False) -> str:
        """The text of the ids, with the names of special tokens only if asked for.

        Raises:
            InputError: an id is negative, or vocab_size or more, or ids are not one row.
        """
        size = self._processor.vocab_size()
        given = checked_ids(ids, self.vocab_size).tolist()
        names = self._names if special else {}
        runs = itertools.groupby((i for i in given if special or i not in self._names), key=names.get)
        return "".join(
            self._processor.decode([i for i in run if i < size]) if name is None else name * len(list(run))
            for name, run in runs
        )

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """The text of the ids as they come, each character once it is whole; joined, it is what `decode` gives."""
        shown = (i for i in each(ids, self.vocab_size) if i not in self._names)
        return stream_by_windows(shown, self.decode, lambda i: False)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model` and `tokenizer_config.json`, which `find_tokenizer` reads.

        Raises:
            InputError: the directory holds a tokenizer of another kind.
        """
        adds = {"add_bos_token": self.add_bos, "add_eos_token": self.add_eos}
        write_vocabulary(directory, "tokenizer.model", self.model, {**config_of(self), **adds, **added(self.special)})
