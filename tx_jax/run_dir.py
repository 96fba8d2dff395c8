"""A run directory belongs to one run: its `config.json` says which, and what may change when the run goes on.

And to one process at a time, which holds its `lock`.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from tx_jax.config_json import from_json, to_json
from tx_jax.errors import InputError, require
from tx_jax.run_config import CHANGEABLE, RunConfig

RunDir = str | os.PathLike[str]
UNFINISHED_CONFIG = "config.json.tmp"
LOCK = "lock"
METRICS = "metrics.jsonl"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that have none, such as some over a network
ANOTHER = "use another --run-dir"
# Fields that may change when a run goes on: they do not enter the mathematics of a step.
FREE = re.compile(
    r"run_dir|profile|log_to|resume|change|mesh\..*|train\.(\w+_every|keep\w*|max_skipped|n_averaged|n_scored|sample_\w+|accumulate_steps|remat|scan_layers)"
)


def write_config(run_dir: RunDir, cfg: RunConfig) -> None:
    """Write `run_dir/config.json`, whole or not at all, making the directory if need be."""
    path = pathlib.Path(run_dir)
    with _writable(path):
        path.mkdir(parents=True, exist_ok=True)
        (path / UNFINISHED_CONFIG).write_text(to_json(cfg), encoding="utf-8")
        os.replace(path / UNFINISHED_CONFIG, path / "config.json")


@contextlib.contextmanager
def _writable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        rule = f"run_dir='{path}' cannot be written to ({error.strerror})"
        raise InputError(f"{rule}; make room and give rights there, or {ANOTHER}") from None


def read_config(run_dir: RunDir) -> RunConfig:
    """The configuration of the run in `run_dir`.

    Raises:
        InputError: there is no config.json, or one that is not a RunConfig.
    """
    path = pathlib.Path(run_dir) / "config.json"
    require(path.is_file(), f"run_dir='{run_dir}' holds no config.json; name the --run-dir of a training run")
    try:
        return from_json(RunConfig, path.read_text(encoding="utf-8"))
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; use another --run-dir") from error


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[int]:
    """Keep other processes out of a run directory, which is made if need be. The lock ends with its process.

    Raises:
        InputError: another process has it, or the directory is no run's.
    """
    path = pathlib.Path(run_dir)
    _is_used(path)
    is_new = not path.exists()
    with contextlib.ExitStack() as held:
        with _writable(path):
            file = held.enter_context(_lock_file(path))
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield os.getpid()
        finally:
            with contextlib.suppress(OSError):
                (path / LOCK).unlink()
                if is_new:  # and the run was refused, if it can be removed: nothing stays
                    path.rmdir()


def _lock_file(path: pathlib.Path) -> TextIO:
    """The file that only this process has: the one in the directory, and not one that a process before has removed."""
    import fcntl  # here, because there is none on Windows, where `import tx_jax` works

    while True:
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
            file = opened.enter_context((path / LOCK).open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                rule = f"run_dir='{path}' is in use by {file.read() or 'another process'}"
                raise InputError(f"{rule}; wait for its end, or {ANOTHER}") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"WARNING: no locks in run_dir='{path}': start no second run there", file=sys.stderr)
            if os.path.samestat(os.fstat(file.fileno()), (path / LOCK).stat()):
                opened.pop_all()
                return file


def _is_used(run_dir: RunDir) -> bool:
    """Whether a run is in the directory.

    Raises:
        InputError: there is something else.
    """
    path = pathlib.Path(run_dir)
    require(path.is_dir() or not path.exists(), f"run_dir='{run_dir}' is a file; {ANOTHER}")
    used = path.is_dir() and any(entry.name not in (UNFINISHED_CONFIG, LOCK) for entry in path.iterdir())
    is_run = not used or (path / "config.json").exists()
    require(is_run, f"run_dir='{run_dir}' holds files but no config.json; {ANOTHER}")
    return used


def check_run_dir(run_dir: RunDir, cfg: RunConfig, changes: frozenset[str] = frozenset()) -> None:
    """Hold `run_dir` to be a home for the run `cfg`: new, or one in which the same run goes on.

    Raises:
        InputError: run_dir is a file, holds other things, or a run that differs in a field that is neither FREE nor
            among the changes, or cfg's own.
    """
    if _is_used(run_dir):
        check_fields(f"run_dir='{run_dir}' holds a run", fields_of(read_config(run_dir)), cfg, cfg.changes | changes)


def check_fields(where: str, old: dict[str, Any], cfg: RunConfig, changes: frozenset[str]) -> dict[str, Any]:
    """The old values of the fields that differ from those of cfg, but for FREE ones.

    Raises:
        InputError: one is not among the changes.
    """
    new = fields_of(cfg)
    differ = {
        name: old[name] for name in sorted(new.keys() & old) if not FREE.fullmatch(name) and old[name] != new[name]
    }
    names = [name for name in differ if name not in changes]
    says = ", ".join(f"{name}={old[name]!r}, not {new[name]!r}" for name in names[:3])
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    may = f", or --change {','.join(names).replace('_', '-')}" if all(map(CHANGEABLE.fullmatch, names)) else ""
    require(not names, f"{where} with {says}{more}; {ANOTHER}, or its values{may}")
    return differ


def claim_run_dir(run_dir: RunDir, cfg: RunConfig, changes: frozenset[str] = frozenset()) -> None:
    """Make `run_dir` the home of the run `cfg`, by a config.json with its values, and all changes so far.

    Raises:
        InputError: as `check_run_dir`.
    """
    check_run_dir(run_dir, cfg, changes)
    change = ",".join(sorted(cfg.changes | changes_of(run_dir).keys())) or None
    write_config(run_dir, dataclasses.replace(cfg, resume="auto", change=change))


def changes_of(run_dir: RunDir) -> dict[str, Any]:
    """What the run in run_dir was told to change, so far, and to what."""
    if not _is_used(run_dir):
        return {}
    cfg = read_config(run_dir)
    return {name: fields_of(cfg)[name] for name in cfg.changes}


def read_metrics(run_dir: RunDir) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without lines that a disk that failed has cut or joined."""
    found = []
    for line in (pathlib.Path(run_dir) / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict)]


def fields_of(cfg: RunConfig) -> dict[str, Any]:
    """Its fields and those of the configs within it, by their dotted names."""
    return _fields(dataclasses.asdict(cfg))


def _fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config and of those within it, by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        found |= inner
    return found
