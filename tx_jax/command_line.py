"""What train.py and sample.py share: flags from dataclasses (by tyro), and errors in one line.

A run config is a preset or a config.json, with flags on top.
"""

import contextlib
import dataclasses
import io
import itertools
import logging
import operator
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax
import tyro

from tx_jax.config import OF_THE_RUN, ModelConfig
from tx_jax.config_json import from_json
from tx_jax.data.token_files import is_token_files
from tx_jax.data.wheels import cache_dir
from tx_jax.errors import InputError, nearest, require
from tx_jax.run_config import RunConfig
from tx_jax.run_dir import fields_of, read_config
from tx_jax.run_presets import RUNS

USAGE = """usage: python train.py PRESET|CONFIG.json [--run-dir DIR] [flags]

Train a Transformer; run the same command again to continue. Ctrl-C saves first. --dry-run tells what the run needs, and
how long it takes here, and writes nothing.

presets:
{presets}
A CONFIG.json is what a run directory holds. All flags, with their values: python train.py PRESET --help

Of many processes each has --coordinator auto, or --coordinator HOST:PORT --n-processes N --process-id I.
"""
OF_INIT = (  # what is that of the model to begin with, if there is one
    *(f"model.{field.name}" for field in dataclasses.fields(ModelConfig) if field.name not in OF_THE_RUN),
    "data.tokenizer",
    "data.vocab_size",
)
BACKENDS = ("cpu", "tpu")  # whose presets differ; a GPU's are those of a TPU
C = TypeVar("C")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2; anything else keeps its traceback.

    Ctrl-C, and a reader who has gone (`| head`), end without a word, with the shell's codes for their signals. What a
    script writes is not open to everybody to write, whatever the umask.
    """
    os.umask(os.umask(0o022) | stat.S_IWOTH)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Grain warns of profilers on older jaxlibs
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # reads that have failed once are told of once
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)  # at once: Python's own end takes memory away from what XLA still computes, and crashes
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
        sys.exit(141)
    except (InputError, OSError, MemoryError) as error:
        why = "out of memory; ask for less, such as a smaller batch: " if isinstance(error, MemoryError) else ""
        with contextlib.suppress(OSError):
            print("error:", why + " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


def keep_compiled() -> None:
    """Keep compiled programs on disk, so that the second start is quick."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


def parse(kind: type[C], args: list[str], *, prog: str, default: C | None = None) -> C:
    """The value of the dataclass `kind` that `args` describe, on top of `default`. --help prints, and exits with 0.

    Raises:
        InputError: a flag is unknown, or lacks a value of its type, or the values break a rule of `kind`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=args, prog=prog)
            return tyro.cli(kind, args=args, prog=prog, default=default)
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(_broken_rule(end) or _unboxed(said.getvalue(), prog)) from None


def _broken_rule(error: BaseException | None) -> str | None:
    """The InputError that tyro caught and wrapped before it gave up, in its own words."""
    while error is not None and not isinstance(error, InputError):
        error = error.__context__
    return None if error is None else str(error)


def _unboxed(said: str, prog: str) -> str:
    """What tyro says under the title of its box, up to a blank line or a rule, and the first flag that it suggests."""
    said = re.sub(r"\x1b\[[\d;]*m", "", said)  # colours, where standard output is a terminal
    rows = itertools.dropwhile(_is_rule, said.splitlines()[1:])
    words = " ".join(row.strip("│ ") for row in itertools.takewhile(lambda row: not _is_rule(row), rows)).rstrip(".")
    suggested = re.search(r"^[│ ] {5}(--[^\s,]+)", said, re.MULTILINE) if "Unrecognized" in words else None
    return f"{words}; did you mean {suggested[1]}?" if suggested else f"{words}; see {prog} --help"


def _is_rule(row: str) -> bool:
    return not row.strip("│╰╯─- ")  # of dashes where the terminal is not UTF-8


def parse_run(args: list[str]) -> RunConfig:
    """The run that a command line describes: defaults < preset or file < flags.

    A preset's values are those of this backend or, of a run that was begun on another, of that one.

    Raises:
        InputError: there is no such preset or file, or the flags break a rule.
    """
    name, *flags = args
    if name == "--tyro-print-completion":  # for ./train.py, whatever its preset
        return parse(RunConfig, args, prog="train.py")
    if name in ("-h", "--help"):
        rows = (f"  {name:<26}{(make.__doc__ or '').splitlines()[0]}\n" for name, make in RUNS.items())
        print(USAGE.format(presets="".join(rows)))
        sys.exit(0)
    prog = f"train.py {name}"
    default = RUNS[name](jax.default_backend()) if name in RUNS else _read(Path(name))
    cfg = parse(RunConfig, flags, prog=prog, default=default)
    if name in RUNS and (Path(cfg.run_dir) / "config.json").is_file():
        stored = fields_of(read_config(cfg.run_dir))
        for other in map(RUNS[name], BACKENDS):
            with contextlib.suppress(InputError):  # of flags that are not for that one
                begun = parse(RunConfig, flags, prog=prog, default=other)
                if _holds(stored, begun, rather_than=cfg):
                    cfg, default = begun, other
    check_init(cfg, default)
    return cfg


def _holds(stored: dict[str, object], cfg: RunConfig, rather_than: RunConfig) -> bool:
    """Whether what is stored is of cfg wherever the two differ."""
    other = fields_of(rather_than)
    return all(stored[name] == value for name, value in fields_of(cfg).items() if value != other[name])


def check_init(cfg: RunConfig, default: RunConfig) -> None:
    """Hold a run that begins with another model to the flags that have a say then.

    Raises:
        InputError: a flag says of the model, or of its tokenizer, what --init or token files say already.
    """
    files = cfg.data.path if cfg.data.mixture is None else cfg.data.mixture
    made = cfg.data.mixture is not None or is_token_files(cfg.data.path)
    for name in ("tokenizer", "vocab_size") if made else ():
        flag = f"--data.{name.replace('_', '-')}"
        same = getattr(cfg.data, name) == getattr(default.data, name)
        require(same, f"{flag} cannot be chosen with the token files of {files}, which have a tokenizer; leave it out")
    changed = [name for name in OF_INIT if operator.attrgetter(name)(cfg) != operator.attrgetter(name)(default)]
    flags = ", ".join("--" + name.replace("_", "-") for name in changed[:3])
    rule = f"{flags} cannot be chosen with --init {cfg.init}, which brings its model and its tokenizer"
    require(cfg.init is None or not changed, f"{rule}; leave out the one or the other")


def _read(path: Path) -> RunConfig:
    close = nearest(str(path), RUNS)
    hint = f"did you mean {close!r}?" if close else "or give a CONFIG.json"
    require(path.suffix == ".json", f"preset={str(path)!r} is not one of {', '.join(RUNS)}; {hint}")
    require(path.is_file(), f"config={str(path)!r} does not exist; give a config.json, or one of {', '.join(RUNS)}")
    try:
        cfg = from_json(RunConfig, path.read_text(encoding="utf-8"))
        return dataclasses.replace(cfg, change=None)  # what that run was allowed is not so for all that is to come
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"config={str(path)!r} cannot be read: {error}; mend it, or give a preset") from error
