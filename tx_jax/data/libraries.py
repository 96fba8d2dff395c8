"""What the tokenizers of public models share: libraries, their errors in one line, streaming, the file beside them."""

import contextlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int32

from tx_jax.data.tokenizers import checked_ids, replace_file
from tx_jax.errors import InputError, require

CONFIG = "tokenizer_config.json"  # Hugging Face's name and keys
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")  # what `save` writes, by kind
AGAIN = "take the file from the model's publisher again"


@runtime_checkable
class Ends(Protocol):
    """A tokenizer that knows which ids begin and end a text."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def chat_template(self) -> str | None: ...
    def token(self, i: int) -> str: ...


def row(ids: Iterable[int]) -> Int32[np.ndarray, " T"]:
    """The ids as one row."""
    return np.fromiter(ids, np.int32)


def each(ids: Iterable[SupportsIndex], vocab_size: int) -> Iterator[int]:
    """The ids as they come, each checked."""
    return (int(checked_ids([i], vocab_size)[0]) for i in ids)


def split_at(text: str, tokens: Iterable[str]) -> list[str]:
    """The text cut around each of the tokens, the longest first: text, token, text, …, text.

    >>> split_at("a<s>b", ["<s>"])
    ['a', '<s>', 'b']
    """
    found = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)
    return re.split(f"({found})", text) if found else [text]


def package(name: str, extra: str) -> Any:
    """The package that an extra of this library brings.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this needs the package {name}; pip install 'tx_jax[{extra}]'") from error


@contextlib.contextmanager
def one_line(rule: str, remedy: str) -> Iterator[None]:
    """Turn what the libraries raise into one InputError, and leave faults of ours and interrupts alone."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError, OverflowError) as error:
        raise InputError(f"{rule} ({_first_line(error)}); {remedy}") from error
    except BaseException as error:  # `tokenizers` raises Exception itself; a panic in Rust is a class none can import
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{rule} ({_first_line(error)}); {remedy}") from error


def _first_line(error: BaseException) -> str:
    return f"{error!s:.120}".split("\n")[0]


def stream_by_windows(
    ids: Iterable[int], decode: Callable[[list[int]], str], unfinished: Callable[[int], bool]
) -> Iterator[str]:
    """The text of the ids as they come, for a decoder that needs the tokens before: a short window is decoded again.

    Source: text-generation-inference, Model.decode_token. Here the window always holds something that is no space: some
    decoders drop all the spaces in front.
    """
    window, shown = [], ""  # `shown`: the part of the window's text that was given out
    start = 0  # of the ids of which nothing was given out
    for i in ids:
        window.append(i)
        text = decode(window)
        if text.endswith("\ufffd") or unfinished(i) or not (text.startswith(shown) and len(text) > len(shown)):
            continue
        yield text[len(shown) :]
        rest = decode(window[start:])
        window, shown = (window[start:], rest) if rest.strip() else (window, text)
        start = len(window)
    yield decode(window)[len(shown) :]


def write_vocabulary(
    directory: str | os.PathLike[str], name: str, content: bytes, config: Mapping[str, object]
) -> None:
    other = [file for file in VOCABULARIES if file != name and (Path(directory) / file).exists()]
    require(not other, f"{directory} holds another kind of tokenizer ({', '.join(other)}); save in an empty directory")
    replace_file(Path(directory) / name, content)
    text = json.dumps(config, indent=2)
    replace_file(Path(directory) / CONFIG, (text + "\n").encode("utf-8"))


def config_of(self: Ends) -> Mapping[str, object]:
    """What stands beside the vocabulary, in the keys of Hugging Face."""
    template = {} if self.chat_template is None else {"chat_template": self.chat_template}
    return {
        **template,
        "bos_token": None if self.bos_id is None else self.token(self.bos_id),
        "eos_token": self.token(self.eos_ids[0]) if self.eos_ids else None,
        "bos_token_id": self.bos_id,  # the ids are for us: there may be several ends
        "eos_token_id": list(self.eos_ids),
        "clean_up_tokenization_spaces": False,
    }


def added(special: Iterable[tuple[str, int]]) -> dict[str, object]:
    return {"added_tokens_decoder": {str(i): {"content": text, "special": True} for text, i in special}}


def check_ends(vocab_size: int, ids: Iterable[int | None]) -> None:
    """Refuse an id to begin or end a text with that the tokenizer does not have."""
    for i in ids:
        rule = f"id {i} cannot begin or end a text"
        require(i is None or 0 <= i < vocab_size, f"{rule}; the ids of this tokenizer are 0 to {vocab_size - 1}")
