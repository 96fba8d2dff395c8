"""The tokenizers of public models: subwords, in the three kinds of file that models are published with.

A value is the content of such a file and the few facts that stand beside it (which ids begin and end a text, how a chat
is written), so that it is frozen, hashable, equal to what its own directory gives back, and as good as the library that
reads the file: `tokenizers`, `sentencepiece` or `tiktoken`. These are extras, imported when they are needed.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from tx_jax.data.byte_ranks import TiktokenTokenizer
from tx_jax.data.libraries import (
    AGAIN,
    check_ends,
    config_of,
    each,
    one_line,
    package,
    row,
    stream_by_windows,
    write_vocabulary,
)
from tx_jax.data.sentencepieces import SentencePieceTokenizer
from tx_jax.data.tokenizers import Ids, checked_ids, utf8
from tx_jax.errors import require


@functools.lru_cache(maxsize=2)
def _built(content: str) -> Any:
    """The library's tokenizer of a tokenizer.json."""
    library = package("tokenizers", "hf")
    with one_line("the tokenizer.json is malformed", AGAIN):
        tokenizer = library.Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
    def train(
        cls, text: str, vocab_size: int, special_tokens: Sequence[str] = (), *, split_digits: bool = False
    ) -> "SubwordTokenizer":
        """Byte-level BPE learnt from the text, in GPT-2's manner: the 256 bytes, and a merge for each further id.

        A text too short for as many merges gives fewer ids.

        Args:
            special_tokens: names of the first ids, which no text has. `<s>` begins a text, `</s>` ends one.
            split_digits: no token holds two digits, so that a number is read by its places.

        Raises:
            InputError: vocab_size is below 256 and the special tokens, or the text holds a lone surrogate.
        """
        least = 256 + len(special_tokens)
        says = "one for each byte" + f" and {len(special_tokens)} special tokens" * bool(special_tokens)
        require(vocab_size >= least, f"vocab_size={vocab_size} must be at least {least}, {says}")
        utf8(text)
        library = package("tokenizers", "hf")
        tokenizer = library.Tokenizer(library.models.BPE())
        pieces = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pieces
        if split_digits:
            digits = library.pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([digits, pieces])
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([text], trainer)
        begin, end = (tokenizer.token_to_id(name) for name in ("<s>", "</s>"))
        if end is not None:
            tokenizer.post_processor = library.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", end)])
        return cls(tokenizer.to_str(), begin, () if end is None else (end,))

    @functools.cached_property
    def _reads_special(self) -> Any:
        return _built(self.json)

    @functools.cached_property
    def _reads_text(self) -> Any:
        tokenizer = _built.__wrapped__(self.json)
        tokenizer.encode_special_tokens = True  # the library's name for: leave special tokens in a text alone
        return tokenizer

    @functools.cached_property
    def _cuts_names(self) -> Any:
        """What reads a text in which the name of a special token is a word of the vocabulary, too."""
        library, tokenizer = package("tokenizers", "hf"), _built.__wrapped__(self.json)
        tokenizer.encode_special_tokens = True
        names = (name for name in self.special_tokens if len(name) > 1)
        first = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        cut = library.pre_tokenizers.Split(library.Regex(first), "isolated")
        before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
        tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*before, cut])
        return tokenizer

    @functools.cached_property
    def _never_text(self) -> frozenset[int]:
        """The ids that no text has: special ones, but for that of what is unknown."""
        model = json.loads(self.json).get("model", {})
        unknown = {model.get("unk_id"), self.special_tokens.get(model.get("unk_token"))}
        return frozenset(self.special_tokens.values()) - unknown

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
        with one_line("the tokenizer cannot encode the text", "its tokenizer.json has no token for it"):
            if special:
                return row(self._reads_special.encode(text, add_special_tokens=add_special_tokens).ids)
            found = self._reads_text.encode(text, add_special_tokens=add_special_tokens)
            if self._forged(found):
                found = self._cuts_names.encode(text, add_special_tokens=add_special_tokens)
            forged = self._forged(found)
        require(not forged, f"the text holds {forged}, which this tokenizer cannot read as text; leave it out")
        return row(found.ids)

    def encode_each(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """What `encode` gives for each text, by all cores."""
        for text in texts:
            utf8(text)
        with one_line("the tokenizer cannot encode the texts", "its tokenizer.json has no token for them"):
            found = self._reads_text.encode_batch(list(texts), add_special_tokens=False)
        return [
            self.encode(text) if self._forged(one) else row(one.ids) for text, one in zip(texts, found, strict=True)
        ]

    def encode_lines(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """The ids of many texts, each with what stands around it; special tokens are text. Faster than one by one."""
        for text in texts:
            utf8(text)
        with one_line("the tokenizer cannot encode the texts", "its tokenizer.json has no token for them"):
            return [row(found.ids) for found in self._reads_text.encode_batch(list(texts))]

    def _forged(self, found: Any) -> str:
        """The names of the special tokens that a text became, but for those that stand around it."""
        ids = (i for i, around in zip(found.ids, found.special_tokens_mask, strict=True) if not around)
        return ", ".join(sorted({self.token(i) for i in ids if i in self._never_text}))

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


Subwords = SubwordTokenizer | SentencePieceTokenizer | TiktokenTokenizer
