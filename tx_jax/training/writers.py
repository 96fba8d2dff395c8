"""Where else a run's numbers go, if it is asked to: TensorBoard's event files, or Weights & Biases."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tx_jax.errors import InputError
from tx_jax.run_config import RunConfig
from tx_jax.run_dir import fields_of


class Writer(NamedTuple):
    """One that takes numbers, by name."""

    add: Callable[[int, dict[str, float]], object]  # (step, numbers)
    close: Callable[[], object]


NOWHERE = Writer(lambda step, numbers: None, lambda: None)


def open_writer(cfg: RunConfig) -> Writer:
    """The one that cfg.log_to names.

    Raises:
        InputError: its package is not installed, or will not do.
    """
    library = find_library(cfg)
    return NOWHERE if library is None else WRITERS[cfg.log_to][0](library, cfg)


def careful(writer: Writer, say: Callable[[str], object]) -> Writer:
    """The writer up to its first failure, of which `say` is told: somebody else's log is no harm to a run."""
    failed: list[Exception] = []

    def tried(function: Callable) -> Callable:
        def call(*args: Any) -> None:
            try:
                if not failed:
                    function(*args)
            except Exception as error:  # a socket's, a disk's, its own: none is worth the run
                failed.append(error)
                say(f"WARNING: log_to takes no more numbers ({error!r:.200}); metrics.jsonl has them all")

        return call

    return Writer(*map(tried, writer))


def find_library(cfg: RunConfig) -> Any:
    """The package that cfg.log_to needs; None: none. Raises as `open_writer` does."""
    if cfg.log_to == "none":
        return None
    try:
        return importlib.import_module(WRITERS[cfg.log_to][1])
    except ImportError:
        rule = f"log_to={cfg.log_to!r} needs a package that is not installed"
        raise InputError(f"{rule}; pip install {cfg.log_to}, or give --log-to none") from None


def tensorboard(library: Any, cfg: RunConfig) -> Writer:
    """Event files in run_dir/tensorboard, one for each start: steps that are taken again are in both."""
    writer = library.Writer(str(Path(cfg.run_dir) / "tensorboard"))

    def add(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()

    return Writer(add, writer.close)


def wandb(library: Any, cfg: RunConfig) -> Writer:
    """A run, which goes on where this directory's did. WANDB_PROJECT and WANDB_MODE=offline are heeded."""
    where = Path(cfg.run_dir).resolve()
    before = sorted(where.glob("wandb/*run-*-*"), key=os.path.getmtime)
    own = before[-1].name.partition("run-")[2].partition("-")[2] if before else None
    how = {"name": where.name, "id": own, "resume": "allow", "dir": str(where), "config": fields_of(cfg)}
    try:
        run = library.init(project=os.environ.get("WANDB_PROJECT", "tx_jax"), **how)
    except library.Error as error:
        rule = f"log_to='wandb' cannot begin: {str(error).splitlines()[0]:.200}"
        raise InputError(f"{rule}; run wandb login, set WANDB_MODE=offline, or give --log-to none") from None
    run.define_metric("*", step_metric="step")  # its own count of steps never goes back, as a run may
    return Writer(lambda step, numbers: run.log({"step": step} | numbers), run.finish)


WRITERS = {"tensorboard": (tensorboard, "tensorboard.summary"), "wandb": (wandb, "wandb")}  # with what each imports
