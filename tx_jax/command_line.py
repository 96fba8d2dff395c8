"""What train.py and sample.py share: flags from dataclasses (by tyro), and errors in one line.

A run config is a preset or a config.json, with flags on top.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import tyro

from tx_jax.config import RunConfig, from_json
from tx_jax.data.corpora import cache_dir
from tx_jax.errors import InputError, require
from tx_jax.presets import RUNS

USAGE = """usage: python train.py PRESET|CONFIG.json [--run-dir DIR] [flags]

Train a Transformer; run the same command again to continue. Ctrl-C saves first.

presets:
{presets}
A CONFIG.json is what a run directory holds. All flags, with their values: python train.py PRESET --help
"""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except (InputError, OSError) as error:
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def keep_compiled() -> None:
    """Keep compiled programs on disk, so that the second start is quick."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


def parse_run(args: list[str]) -> RunConfig:
    """The run that a command line describes: defaults < preset or file < flags.

    Raises:
        InputError: there is no such preset or file, or the flags break a rule.
    """
    if not args or args[0] in ("-h", "--help"):
        rows = (f"  {name:<26}{(make.__doc__ or '').splitlines()[0]}\n" for name, make in RUNS.items())
        print(USAGE.format(presets="".join(rows)))
        sys.exit(0 if args else 2)
    name, *flags = args
    require(name in RUNS or name.endswith(".json"), f"preset={name!r} is not one of {', '.join(RUNS)}; or give a CONFIG.json")
    default = RUNS[name](jax.default_backend()) if name in RUNS else _read(Path(name))
    return tyro.cli(RunConfig, args=flags, default=default, prog=f"train.py {name}", description="")


def _read(path: Path) -> RunConfig:
    require(path.is_file(), f"config={str(path)!r} does not exist; give a config.json, or one of {', '.join(RUNS)}")
    return from_json(RunConfig, path.read_text(encoding="utf-8"))
