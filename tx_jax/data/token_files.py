"""Token files: documents as ids in memory-mapped shards, for corpora beyond memory.

A directory holds index.json, tokenizer/ and, for each shard, NNNNN.tokens (ids, one document after another) and
NNNNN.ends (int64: where each document ends, in tokens and in bytes of text that are predicted). The index has the size
and the SHA-256 of each file, and is written anew after each shard: what was interrupted goes on there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from tx_jax.config_json import read_object
from tx_jax.data.tokenizers import replace_file
from tx_jax.errors import InputError, require

INDEX = "index.json"
KINDS = ("tokens", "ends")  # files of a shard
SHARD = 2**26  # tokens of a shard, at least: a shard is what an interruption costs
LIMIT = 10**8  # bytes of an index
AGAIN = "run python -m tx_jax.data.prepare again, which mends it, or bring the file back"
Ids = Integer[np.ndarray, " _"]


class TokenFiles(NamedTuple):
    """Documents, read where they lie."""

    directory: Path
    sha256: str  # of the index, and so of all documents
    vocab_size: int
    tokens: tuple[np.ndarray, ...]  # of each shard
    ends: tuple[Int64[np.ndarray, "documents 2"], ...]

    @property
    def lengths(self) -> Int64[np.ndarray, "documents 2"]:
        """Tokens of each document, and bytes of its text that are predicted."""
        return np.concatenate([np.diff(ends, axis=0, prepend=0) for ends in self.ends])


def is_token_files(path: str | os.PathLike[str] | None) -> bool:
    """Whether `prepare` has been at work there."""
    return path is not None and (Path(path).expanduser() / INDEX).is_file()


def open_token_files(directory: str | os.PathLike[str]) -> TokenFiles:
    """The documents of a directory, once every file of it is seen to be what was written.

    Raises:
        InputError: there are none, they are not finished, or a file is truncated or was changed.
    """
    home = Path(directory).expanduser()
    require(is_token_files(home), f"{home} holds no {INDEX}; make it by python -m tx_jax.data.prepare")
    index = _read_index(home)
    require(index.get("finished") is True, f"{home} is not finished; run python -m tx_jax.data.prepare again")
    files = [(_file(home, i, kind), shard[kind]) for i, shard in enumerate(index["shards"]) for kind in KINDS]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        list(pool.map(lambda file: _verify(*file), files))
    n = range(len(index["shards"]))
    return TokenFiles(
        home,
        hashlib.sha256((home / INDEX).read_bytes()).hexdigest(),
        index["vocab_size"],
        tuple(np.memmap(_file(home, i, "tokens"), np.dtype(index["dtype"]), "r") for i in n),
        tuple(np.memmap(_file(home, i, "ends"), np.dtype("<i8"), "r").reshape(-1, 2) for i in n),
    )


def begin_token_files(home: Path, source: dict[str, Any]) -> dict[str, Any]:
    """The index of what is there, without the shards from the first on that is not as it was written; or a new one.

    Args:
        source: what the documents are of, as JSON; what goes on must have the same.

    Raises:
        InputError: the directory holds other files, or documents of another source.
    """
    if not is_token_files(home):
        require(not home.exists() or home.is_dir(), f"out='{home}' is a file; use another directory")
        require(not home.exists() or not any(home.iterdir()), f"out='{home}' holds other files; use another directory")
        _begin(home, source)
    index = _read_index(home)
    theirs = index.get("source", {})
    if theirs and theirs != source and not index["shards"]:  # as after a mistake in the flags: nothing is lost
        theirs = (index := _begin(home, source))["source"]
    differ = [f"{key}={theirs.get(key)!r}, not {x!r}" for key, x in source.items() if theirs.get(key) != x]
    require(not differ, f"{home} holds token files of {', '.join(differ)}; use another directory, or delete it")
    whole = [_is_whole(home, number, shard) for number, shard in enumerate(index["shards"])]
    n = [*whole, False].index(False)  # what comes after a fault is written anew, to the same bytes
    return index | {"shards": index["shards"][:n], "finished": index["finished"] and all(whole)}


def _begin(home: Path, source: dict[str, Any]) -> dict[str, Any]:
    index = {"source": source, "finished": False, "shards": []}
    shutil.rmtree(home / "tokenizer", ignore_errors=True)
    replace_file(home / INDEX, json.dumps(index).encode())
    return index


def write_token_files(
    home: Path,
    index: dict[str, Any],
    documents: Callable[[int], Iterable[tuple[Ids, int]]],
    vocab_size: int,
    shard_size: int = SHARD,
) -> dict[str, Any]:
    """Write what is missing, in shards; the index.

    Args:
        index: of `begin_token_files`.
        documents: (a number) → those from that number on: ids, and the bytes of text that all but the first stand for.

    Raises:
        InputError: there are none.
    """
    for left in home.glob(f"{INDEX}.*.part"):  # by a kill
        left.unlink()
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    index = index | {"vocab_size": vocab_size, "dtype": dtype.str, "shards": list(index["shards"])}
    rest = iter(documents(sum(shard["documents"] for shard in index["shards"])) if not index["finished"] else ())
    while not index["finished"]:
        number, size, n_bytes, ends = len(index["shards"]), 0, 0, []
        with _part(home, number, "tokens").open("wb") as file:
            for ids, text in rest:
                file.write(ids.astype(dtype).tobytes())
                size, n_bytes = size + len(ids), n_bytes + text
                ends.append((size, n_bytes))
                if size >= shard_size:
                    break
            file.flush()
            os.fsync(file.fileno())
        _part(home, number, "ends").write_bytes(np.array(ends, "<i8").tobytes())
        if ends:
            about = {kind: _about(_part(home, number, kind)) for kind in KINDS}
            for kind in KINDS:
                os.replace(_part(home, number, kind), _file(home, number, kind))
            index["shards"].append({"documents": len(ends), "size": size} | about)
        else:
            for kind in KINDS:
                _part(home, number, kind).unlink()
            rule = f"path={index['source'].get('path')!r} holds no document"
            require(index["shards"], f"{rule}; there is nothing to train on")
            index["finished"] = True
        replace_file(home / INDEX, json.dumps(index, indent=1).encode())
    return index


def _read_index(home: Path) -> dict[str, Any]:
    try:
        return read_object(home / INDEX, LIMIT)
    except InputError as error:
        raise InputError(f"{home / INDEX} is broken; delete {home}, and prepare it again") from error


def _is_whole(home: Path, number: int, shard: dict[str, Any]) -> bool:
    """Whether the files of a shard are as they were written."""
    try:
        for kind in KINDS:
            _verify(_file(home, number, kind), shard[kind])
    except InputError:
        return False
    return True


def _file(home: Path, number: int, kind: str) -> Path:
    return home / f"{number:05d}.{kind}"


def _part(home: Path, number: int, kind: str) -> Path:
    return home / f"{number:05d}.{kind}.part"


def _about(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(path: Path, expected: dict[str, Any]) -> None:
    require(path.is_file(), f"{path} is not there; {AGAIN}")
    size = path.stat().st_size
    require(size == expected["bytes"], f"{path} has {size} bytes, not {expected['bytes']}: it was cut; {AGAIN}")
    try:
        now = _about(path)["sha256"]
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); {AGAIN}") from error
    rule = f"{path} has SHA-256 {now[:8]}…, not {expected['sha256'][:8]}…: it was changed"
    require(now == expected["sha256"], f"{rule}; {AGAIN}")
