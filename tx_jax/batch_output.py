"""A file of lines of JSON that one job writes, and goes on with after a kill.

Beside it, OUTPUT.job says what it is written with, so that no lines of two jobs are mixed; with the finished output it
may be removed, or stay to say that all is done.
"""

import contextlib
import fcntl
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tx_jax.config_json import read_object
from tx_jax.errors import InputError, require

ADDED = ("text", "n_tokens", "finish", "log_prob")  # fields that a line has after those of its prompt


@contextlib.contextmanager
def claim(path: Path, told: dict[str, Any], prompts: Sequence[dict[str, Any]]) -> Iterator[tuple[io.FileIO, int]]:
    """The output for this process alone, cut after its last whole line, and how many lines it has.

    Args:
        told: by name, all that has a say in its lines.
        prompts: what each line begins with.

    Raises:
        InputError: it is no file, is in use, or holds what another job wrote.
    """
    require(path.is_file() or not path.exists(), f"output='{path}' is no file; name a file, or a new one")
    with contextlib.ExitStack() as held:
        with _writes(path):
            file = held.enter_context(path.open("ab", buffering=0))
            _lock(file, path)
            _claim_job(path, json.loads(json.dumps(told)))
            n_done, size = _whole_lines(path, prompts)
            file.truncate(size)
        yield file, n_done


def _lock(file: io.FileIO, path: Path) -> None:
    """To the end of this process, or of the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        rule = f"output='{path}' is being written by another process"
        raise InputError(f"{rule}; wait for its end, or name another") from error


@contextlib.contextmanager
def _writes(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        rule = f"output='{path}' cannot be written ({error.strerror})"
        raise InputError(f"{rule}; mend that, and run the same command again: it goes on from what is there") from error


def _claim_job(path: Path, told: dict[str, Any]) -> None:
    """Hold an output with lines to what is told of its job; for one without, tell it."""
    job, another = path.with_name(path.name + ".job"), "name another --output"
    if not path.stat().st_size:
        new = job.with_name(job.name + ".new")
        new.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        new.replace(job)
        return
    require(job.is_file(), f"output='{path}' is there already, without a {job.name} that says of what job; {another}")
    try:
        old = read_object(job)
    except InputError as error:
        raise InputError(f"{job} cannot be read: {error}; {another}") from error
    names = [name for name in sorted(told.keys() | old.keys()) if told.get(name) != old.get(name)]
    says = ", ".join(f"{name}={short(old.get(name))}, not {short(told.get(name))}" for name in names[:3])
    require(not names, f"output='{path}' is of a job with {says}; {another}, or use its values")


def _whole_lines(path: Path, prompts: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """How many there are, and of how many bytes; what follows the last line break was being written at a kill."""
    n_done = size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            fits = n_done < len(prompts) and _answers(line, prompts[n_done])
            require(fits, f"line {n_done + 1} of {path} is not what its job wrote; mend it, or name another --output")
            n_done, size = n_done + 1, size + len(line)
    return n_done, size


def _answers(line: bytes, fields: dict[str, Any]) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and [*row] == [*fields, *ADDED] and row.items() >= fields.items()


def as_line(row: dict[str, Any]) -> bytes:
    """The row in JSON, in UTF-8 as far as its texts can be written so: half of a surrogate pair cannot."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode("ascii")


def append(file: io.FileIO, line: bytes, path: Path) -> None:
    """Write all of the line, so that a kill leaves whole lines and at most a part of one."""
    with _writes(path):
        while line:
            line = line[file.write(line) :]


def short(value: object) -> str:
    """A value as errors show it."""
    return f"{value!r:.100}"
