"""A file of prompts as what a model reads: objects of JSON, one a line, all checked before any text is written.

A line has a "prompt", or, for a model that chats, "messages"; it may have "max_new_tokens", and other fields, which its
text will have, too. Lines of white space are left out.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int

from tx_jax.batch_output import ADDED, short
from tx_jax.data.chat import encode_chat
from tx_jax.data.subwords import Subwords
from tx_jax.errors import InputError, require
from tx_jax.writing import Writer, encode, messages

EXAMPLE = '{"prompt": "Once upon"}'
Row = tuple[str, dict[str, Any]]  # the name that errors give a line, and its object


class Request(NamedTuple):
    """What is to be written."""

    fields: dict[str, Any]  # of its line
    ids: Int[np.ndarray, " T"]
    limit: int  # of new tokens


def read_rows(name: str) -> list[Row]:
    """Each line that is not empty, by the name that errors give it."""
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"input={name!r} cannot be read ({error.strerror}); name a file of lines of JSON") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = [(f"line {n} of {name}", line) for n, line in enumerate(lines, 1) if line.strip()]
    require(rows, f"input={name!r} holds no prompt; write one a line, such as {EXAMPLE}")
    return [(where, _named(where, _row, line)) for where, line in rows]


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, allow_nan=False)  # Python reads NaN, which is no JSON
    except (ValueError, RecursionError) as error:
        raise InputError(f"{short(line.decode('utf-8', 'replace'))} is not JSON ({error}); mend it") from error
    require(isinstance(row, dict), f"{short(row)} is no object; write one, such as {EXAMPLE}")
    given = [name for name in ("prompt", "messages") if name in row]
    require(given, f"it has no prompt but {', '.join(row) or 'nothing'}; add one, such as {EXAMPLE}")
    require(len(given) == 1, "it has both a prompt and messages; leave one out")
    said, kind = row[given[0]], {"prompt": str, "messages": list}[given[0]]
    rule = "a text of at least one character, or messages=[…] in its place"
    require(isinstance(said, kind) and said, f"{given[0]}={short(said)} must be {rule}")
    new = row.get("max_new_tokens", 1)
    whole = type(new) is int and new >= 1
    require(whole, f"max_new_tokens={short(new)} must be a whole number, at least 1; or leave it out")
    taken = [name for name in ADDED if name in row]
    require(not taken, f"it has a field {taken[:1]}, which the output is to have; rename it")
    return row


def _named(where: str, read: Callable, *given: Any) -> Any:
    try:
        return read(*given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def read_requests(rows: Sequence[Row], writer: Writer, system: str | None, chats: bool) -> list[Request]:
    """The rows as the model reads them. A template of chats takes a process each time: hence the threads."""

    def read(named: Row) -> Request:
        where, row = named
        return _named(where, _request, row, writer, system, chats)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [*pool.map(read, rows)]


def _request(row: dict[str, Any], writer: Writer, system: str | None, chats: bool) -> Request:
    require(
        chats or "messages" not in row, "messages are for a model with a chat template, without --raw; give a prompt"
    )
    if chats:
        said = [*messages(system), *(row.get("messages") or messages(None, row["prompt"]))]
        ids = encode_chat(cast(Subwords, writer.tokenizer), said)
    else:
        ids = encode(writer.tokenizer, row["prompt"], writer.ends)
    max_len, limit = writer.model.cfg.max_len, row.get("max_new_tokens") or writer.room(len(ids))
    require(len(ids), "its prompt has no token; a model goes on from at least one")
    rule = f"its prompt has {len(ids)} tokens and max_new_tokens={limit}, max_len={max_len}"
    require(len(ids) + limit <= max_len, f"{rule}; shorten one")
    return Request(row, ids, limit)
