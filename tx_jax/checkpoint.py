"""What a run leaves in `checkpoints/<step>/`: its state, and its place in the data.

It holds a sum of each leaf's bits, to which what is read is held. Parameters are stored apart from the rest, so that
sampling never reads the optimiser's state. `saver.py` writes it.
"""

import contextlib
import errno
import functools
import gc
import inspect
import itertools
import logging
import math
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, PyTree

from tx_jax.errors import InputError, require
from tx_jax.integrity import is_sealed, kind, leaves, sums

RunDir = str | os.PathLike[str]
BASE = "base"  # in a run directory: the parameters that adapters are beside, as the step 0 of a run of its own
ASIDE = ".aside"  # suffix of a step that a run has left for an earlier one
EARLIER = "take an earlier step, by --resume or --step"
STEP = re.compile("0|[1-9][0-9]*")  # the name of a checkpoint
LEAF = re.compile(r'"([^"/]+)/(?:c/[\d/]*|zarr\.json)"')  # of which tensorstore says that it cannot be read
UNBEGUN = ("ignore", "coroutine '.*' was never awaited", RuntimeWarning)  # of reads beside one that has failed
DAMAGED = "{} cannot be read: its metadata is damaged; " + EARLIER


class CheckpointError(InputError):
    """A checkpoint is not what was saved: cut, changed or lost in part."""

    def instead(self, remedy: str) -> "CheckpointError":
        """The same fault with another remedy."""
        return CheckpointError(f"{str(self).rpartition('; ')[0]}; {remedy}")


def latest_step(run_dir: RunDir) -> int | None:
    """The newest step; None if there is none."""
    return max(saved_steps(run_dir), default=None)


def restore(run_dir: RunDir, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The state and the data position saved at `step` (None: the newest).

    `abstract_state` says what to expect and where to put it: arrays, or `jax.ShapeDtypeStruct`s with the sharding that
    each leaf is to have (no sharding: the first device), whatever the devices it was saved from.

    Raises:
        InputError: there is no such checkpoint, it cannot be read, or a leaf differs in name, shape or dtype.
    """
    found, data = _load(step_dir(run_dir, step), parts_of(abstract_state))
    return abstract_state._replace(**(found.pop("state") | found)), data


def parts_of(state: Any) -> dict[str, Any]:
    """A state as what is stored apart and can be read alone, if it is there, and the rest."""
    apart = {name: getattr(state, name, ()) for name in ("params", "ema")}
    rest = {name: tree for name, tree in state._asdict().items() if name not in apart}
    apart = {name: tree for name, tree in apart.items() if jax.tree.leaves(tree)}
    return apart | {"state": rest | {"params": ()}}  # that it has no params is written, too


def restore_params(
    run_dir: RunDir, abstract_params: PyTree, step: int | None = None, *, part: str = "params", n_averaged: int = 1
) -> PyTree[Array]:
    """The parameters alone, saved at `step` (None: the newest); the optimiser's state is not read.

    Args:
        part: params, or ema, the mean over steps that a run may keep.
        n_averaged: the mean of so many checkpoints, or of all if there are fewer, of which step is the last.

    Raises:
        InputError: as `restore`.
    """
    last = int(step_dir(run_dir, step).name)
    steps = [step for step in saved_steps(run_dir) if step <= last][-n_averaged:]
    trees = (_load(step_dir(run_dir, step), {part: abstract_params})[0][part] for step in steps)
    total = functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), trees)
    return total if len(steps) == 1 else jax.tree.map(lambda leaf: leaf / len(steps), total)


def stored_params(run_dir: RunDir, step: int | None = None) -> dict[str, Any]:
    """The shapes of the parameters saved at `step` (None: the newest), in dictionaries whatever they were.

    Raises:
        InputError: there is no such checkpoint, or it cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    path = step_dir(run_dir, step)
    with _one_line(path):
        saved = ocp.checkpointables_metadata(str(path)).metadata["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)


def restore_base(run_dir: RunDir, abstract_params: PyTree) -> PyTree[Array]:
    """The parameters that `saver.save_base` wrote.

    Raises:
        InputError: as `restore`.
    """
    if not jax.tree.leaves(abstract_params):
        return abstract_params
    try:
        return restore_params(pathlib.Path(run_dir) / BASE, abstract_params)
    except InputError as error:  # such as that there is none
        raise CheckpointError(str(error)).instead("bring it back: the adapters are nothing without it") from None


def saved_data(run_dir: RunDir, step: int | None = None) -> dict[str, Any]:
    """What was saved beside the state at `step` (None: the newest); the state is not read.

    Raises:
        InputError: there is no such checkpoint, or it cannot be read.
    """
    return _about(step_dir(run_dir, step))[0]["data"]


def best_step(run_dir: RunDir) -> int:
    """The first step of the least validation loss, of those that were saved when they were evaluated.

    Raises:
        InputError: none has one.
    """
    losses = valid_losses(run_dir)
    rule = f"run_dir='{run_dir}' has no checkpoint of a step that was evaluated"
    require(losses, f"{rule}; train with --train.keep-best, or give a step")
    return min(losses, key=lambda step: losses[step])


def valid_losses(run_dir: RunDir) -> dict[int, float]:
    """The validation losses of the checkpoints that have a finite one, and can be read, by step, in order."""
    found = {}
    for step in saved_steps(run_dir):
        with contextlib.suppress(CheckpointError):
            found[step] = saved_data(run_dir, step).get("valid_loss", math.nan)
    return {step: loss for step, loss in found.items() if math.isfinite(loss)}


def _about(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """What a checkpoint says of itself, of its arrays, and whether it is as 0.1 wrote it, without sums."""
    from orbax.checkpoint import v1 as ocp  # here and below, because `import tx_jax` should be quick

    with _one_line(path):
        about = ocp.checkpointables_metadata(str(path))
        record: Any = about.custom_metadata or {}
    plain = record.keys() == {"data"}
    _check(plain or is_sealed(record), DAMAGED.format(path))
    return record, about.metadata, plain


def _load(path: pathlib.Path, parts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    from orbax.checkpoint import v1 as ocp

    record, metadata, plain = _about(path)
    wanted = {name: kind(leaf) for name, leaf in leaves(parts).items()}
    if plain:
        with _one_line(path):
            saved = {name: kind(leaf) for name, leaf in leaves({name: metadata[name] for name in parts}).items()}
    else:
        told = {name: told for name, told in record["sums"].items() if name.split("/")[0] in parts}
        saved = {name: told.rpartition(" ")[0] for name, told in told.items()}
    # A typed key is written as its uint32 data, and given back as the kind that is in the file, whatever is asked for.
    keys = {name: saved[name] for name, told in wanted.items() if plain and told.startswith("key<") and name in saved}
    _require_same(path, saved, wanted | keys)
    with _one_line(path):
        found = ocp.load_checkpointables(str(path), jax.tree.map(_target, parts))
    if plain:
        _require_same(path, {name: kind(leaf) for name, leaf in leaves(found).items()}, wanted)
    for name, told in {} if plain else sums(found).items():
        _check(record["sums"][name] == told, f"{name} of {path} is damaged: its bits are not those saved; {EARLIER}")
    return found, record["data"]


def _require_same(path: pathlib.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Refuse what Orbax would cast without a word, and name what it would refuse in a page."""
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        require(there == here, f"{name} is {there} in {path}, but {here} here; use the configuration it was saved with")


def _check(ok: object, message: str) -> None:
    if not ok:
        raise CheckpointError(message)


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    """Orbax reports a damaged file by pages of log, one of many errors and what other reads leave: make it one line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hooks = [logger.level for logger in loggers], (sys.unraisablehook, sys.excepthook)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook, sys.excepthook = hushed = hushed_hooks(*hooks)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(*UNBEGUN)
            yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # which say nothing of the file
    except Exception as error:  # of any kind: damage shows as whatever the reader trips over
        if getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE):
            raise
        leaf = LEAF.search(str(error))
        what = "a file of it" if leaf is None else leaf[1].replace(".", "/")
        why, hooks = f"{what} is lost or damaged ({type(error).__name__})", hushed  # from here on
        warnings.filterwarnings(*UNBEGUN)
        logging.getLogger("asyncio").addFilter(_was_retrieved)
        error.__traceback__ = None  # which holds other reads: most end here, where nobody hears
        gc.collect()
        raise CheckpointError(f"{path} cannot be read: {why}; {EARLIER}") from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook, sys.excepthook = hooks


def _was_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def hushed_hooks(unraisable: Callable[[Any], Any], uncaught: Callable[..., Any]) -> tuple[Any, Any]:
    """Both hooks of sys, but not for what is said, some time later, by reads or writes beside one that has failed."""
    late = lambda error: "Event loop is closed" in str(error)  # noqa: E731
    return (
        lambda told: inspect.iscoroutine(told.object) or late(told.exc_value) or unraisable(told),
        lambda kind, error, trace: late(error) or uncaught(kind, error, trace),
    )


def home_of(run_dir: RunDir) -> pathlib.Path:
    return pathlib.Path(run_dir).absolute() / "checkpoints"  # Orbax refuses relative paths


def saved_steps(run_dir: RunDir) -> list[int]:
    """The steps whose checkpoints are there, in order."""
    return sorted(int(path.name) for path in home_of(run_dir).glob("*") if STEP.fullmatch(path.name))


def step_dir(run_dir: RunDir, step: int | None) -> pathlib.Path:
    """Where the checkpoint of a step (None: the newest) lies.

    Raises:
        InputError: there is no such checkpoint.
    """
    steps = saved_steps(run_dir)
    require(steps, f"run_dir='{run_dir}' holds no checkpoint; train with --run-dir {run_dir} up to a save")
    step = steps[-1] if step is None else step
    require(step in steps, f"step={step} is not in run_dir='{run_dir}'; it has {', '.join(map(str, steps))}")
    return home_of(run_dir) / str(step)


def set_aside(run_dir: RunDir, step: int) -> pathlib.Path:
    """Put a checkpoint where nothing looks for one, under its step and the first free number; where it lies then."""
    path = step_dir(run_dir, step)
    names = (path.with_name(f"{step}{ASIDE}{n or ''}") for n in itertools.count())
    return path.rename(next(name for name in names if not name.exists()))


def _target(x: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding Orbax would warn, and use that of the devices it was saved from.
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or SingleDeviceSharding(jax.local_devices()[0]))
