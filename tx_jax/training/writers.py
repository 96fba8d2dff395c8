"""Where else a run's numbers go, if it is asked to: TensorBoard's event files, or Weights & Biases."""

import hashlib
import importlib
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


def open_writer(cfg: RunConfig) -> Writer:
    """The one that cfg.log_to names; none: one that does nothing.

    Raises:
        InputError: its package is not installed.
    """
    return WRITERS[cfg.log_to][0](find_library(cfg), cfg)


def find_library(cfg: RunConfig) -> Any:
    """The package that cfg.log_to needs. Raises as `open_writer` does."""
    try:
        return importlib.import_module(WRITERS[cfg.log_to][1])
    except ImportError:
        rule = f"log_to={cfg.log_to!r} needs a package that is not installed"
        raise InputError(f"{rule}; pip install {cfg.log_to}, or leave it out") from None


def none(library: Any, cfg: RunConfig) -> Writer:
    """Nowhere else."""
    return Writer(lambda step, numbers: None, lambda: None)


def tensorboard(library: Any, cfg: RunConfig) -> Writer:
    """Event files in run_dir/tensorboard; steps that are taken again are shown as they went last."""
    opened: list[Any] = []

    def add(step: int, numbers: dict[str, float]) -> None:
        try:
            if not opened:
                opened.append(library.Writer(str(Path(cfg.run_dir) / "tensorboard")))
            for name, number in numbers.items():
                opened[0].add_scalar(name, number, step)
            opened[0].flush()
        except OSError:  # it takes nothing more: the next numbers get a file of their own
            opened.clear()
            raise

    return Writer(add, lambda: [writer.close() for writer in opened])


def wandb(library: Any, cfg: RunConfig) -> Writer:
    """A run of the project tx_jax, which goes on where this directory's did; WANDB_MODE=offline keeps it there."""
    where = Path(cfg.run_dir).resolve()
    own = hashlib.sha256(str(where).encode()).hexdigest()[:16]
    how = {"name": where.name, "id": own, "resume": "allow", "dir": str(where), "config": fields_of(cfg)}
    run = library.init(project="tx_jax", **how)
    run.define_metric("*", step_metric="step")  # its own count of steps never goes back, as a run may
    return Writer(lambda step, numbers: run.log({"step": step} | numbers), run.finish)


WRITERS = {  # with what each imports
    "none": (none, "tx_jax"), "tensorboard": (tensorboard, "tensorboard.summary"), "wandb": (wandb, "wandb"),
}  # fmt: skip
