"""The tokenizers of public models: subwords, in the three kinds of file that models are published with.

A value is the content of such a file and the few facts that stand beside it (which ids begin and end a text, how a chat
is written), so that it is frozen, hashable, equal to what its own directory gives back, and as good as the library that
reads the file: `tokenizers`, `sentencepiece` or `tiktoken`. These are extras, imported when they are needed.
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

from tx_jax.data.byte_ranks import TiktokenTokenizer
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
class SubwordTokenizer:
    """What a `tokenizer.json` says, which is how nearly every public model is published.

    >>> tokenizer = SubwordTokenizer.train("low lower lowest", vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("slow né")), len(tokenizer.encode("low"))
    ('slow né', 1)
    """

    json: str = dataclasses.field(repr=False)  # the content of tokenizer.json
    bos_id: int | None = None  # begins a text
    eos_ids: tuple[int, ...] = ()  # each ends one; the first is the one to write
    chat_template: str | None = dataclasses.field(default=None, repr=False)  # Jinja, for data.chat
    roles: tuple[tuple[str, str], ...] = ()  # what other libraries ask for, such as ("pad_token", "[PAD]")

    def __post_init__(self) -> None:
        utf8(self.json)
        check_ends(self.vocab_size, (self.bos_id, *self.eos_ids))

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "SubwordTokenizer":
        """Byte-level BPE learnt from the text, in GPT-2's manner: the 256 bytes, and a merge for each further id.

        A text too short for as many merges gives fewer ids.

        Raises:
            InputError: vocab_size is below 256, or the text holds a lone surrogate.
        """
        require(vocab_size >= 256, f"vocab_size={vocab_size} must be at least 256, one for each byte")
        utf8(text)
        library = package("tokenizers", "hf")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
        return cls(tokenizer.to_str())

    def _built(self) -> Any:
        library = package("tokenizers", "hf")
        with one_line("the tokenizer.json is malformed", AGAIN):
            tokenizer = library.Tokenizer.from_str(self.json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _reads_special(self) -> Any:
        return self._built()

    @functools.cached_property
    def _reads_text(self) -> Any:
        library, tokenizer = package("tokenizers", "hf"), self._built()
        tokenizer.encode_special_tokens = True  # the library's name for: leave special tokens in a text alone
        names = [name for name in self.special_tokens if len(name) > 1]
        if names and isinstance(
            tokenizer.model, library.models.Unigram
        ):  # which finds the name all the same, as a word
            first = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
            cut = library.pre_tokenizers.Split(library.Regex(first), "isolated")
            before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
            tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*before, cut])
        return tokenizer

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; an id that stands for no token, between the others, is no text."""
        return max(self._reads_special.get_vocab().values(), default=-1) + 1

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of the tokens that are no text, by name."""
        added = self._reads_special.get_added_tokens_decoder().items()
        return {token.content: i for i, token in added if token.special}

    def token(self, i: int) -> str:
        """The name of a token in the file."""
        return self._reads_special.id_to_token(i) or ""

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name in the file; None: there is none."""
        return self._reads_special.token_to_id(name)

    def encode(self, text: str, *, special: bool = False, add_special_tokens: bool = False) -> Int32[np.ndarray, " T"]:
        """The ids of the text.

        Args:
            special: names of special tokens in the text become their ids; if not, they are text like any other.
            add_special_tokens: with what stands around a whole text, such as `<s>` before it or `[CLS]` … `[SEP]`.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        utf8(text)
        tokenizer = self._reads_special if special else self._reads_text
        with one_line("the tokenizer cannot encode the text", "its tokenizer.json has no token for it"):
            return row(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Ids, *, special: bool = False) -> str:
        """The text of the ids, with the names of special tokens only if asked for.

        Raises:
            InputError: an id is negative, or vocab_size or more, or ids are not one row.
        """
        ids = checked_ids(ids, self.vocab_size)
        with one_line("the tokenizer cannot decode the ids", "the decoder in its tokenizer.json is broken"):
            return self._reads_special.decode(ids.tolist(), skip_special_tokens=not special)

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """The text of the ids as they come, each character once it is whole; joined, it is what `decode` gives."""
        hidden = set(self.special_tokens.values())
        shown = (i for i in each(ids, self.vocab_size) if i not in hidden)
        # a run of byte tokens that is not UTF-8 as a whole is decoded to U+FFFD as a whole: wait for its end
        return stream_by_windows(
            shown, self.decode, lambda i: re.fullmatch("<0x[0-9A-F]{2}>", self.token(i)) is not None
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `find_tokenizer` and Hugging Face's library read.

        Raises:
            InputError: the directory holds a tokenizer of another kind.
        """
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config_of(self), **dict(self.roles)}
        write_vocabulary(directory, "tokenizer.json", self.json.encode("utf-8"), config)


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
        pieces = (piece for piece in split_at(text, known) if piece)
        ids = [[known[piece]] if piece in known else self._processor.encode(piece) for piece in pieces]
        before = [self.bos_id] if add_special_tokens and self.add_bos and self.bos_id is not None else []
        after = self.eos_ids[:1] if add_special_tokens and self.add_eos else []
        return row(itertools.chain(before, *ids, after))

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


Subwords = SubwordTokenizer | SentencePieceTokenizer | TiktokenTokenizer
