"""What a run leaves in `checkpoints/<step>/`: its state, and its place in the data.

A checkpoint is written under a temporary name and renamed when it is whole, so a kill at any moment leaves the last one
in place. It holds a sum of each leaf's bits, to which what is read is held. Parameters are stored apart from the rest,
so that sampling never reads the optimiser's state.
"""

import contextlib
import errno
import functools
import gc
import itertools
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, PyTree

from tx_jax.errors import InputError, require
from tx_jax.integrity import is_sealed, kind, leaves, seal, sums

RunDir = str | os.PathLike[str]
UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix of what is not whole (orbax TMP_DIR_SUFFIX)
BASE = "base"  # in a run directory: the parameters that adapters are beside, as the step 0 of a run of its own
ASIDE = ".aside"  # suffix of a step that a run has left for an earlier one
EARLIER = "remove it to go back to an earlier step"


class CheckpointError(InputError):
    """A checkpoint is not what was saved: cut, changed or lost in part."""


@contextlib.contextmanager
def saver(run_dir: RunDir, keep: int) -> Iterator[Callable[[int, Any, dict[str, Any]], None]]:
    """A function `save(step, state, data)`, to be used inside the `with`, that keeps the `keep` newest checkpoints.

    `state` is a NamedTuple of arrays with a field `params`; `data` is what JSON can hold, a Grain iterator's
    `get_state()`. `save` copies both and returns; writing goes on behind the next steps, which may donate the state's
    buffers. It is on disk when the next `save` returns, or at the end of the `with`, where errors of writing appear.

    >>> import collections, tempfile
    >>> state = collections.namedtuple("State", "step params")(jnp.int32(7), {"w": jnp.ones(3)})
    >>> with tempfile.TemporaryDirectory() as run_dir:
    ...     with saver(run_dir, keep=2) as save:
    ...         save(7, state, {"next_index": 21})
    ...     restore(run_dir, state)[1]
    {'next_index': 21}

    Raises:
        InputError: `save` is given a step that is not after the newest checkpoint.
    """
    from orbax.checkpoint import v1 as ocp  # here and below, because `import tx_jax` should be quick

    pending: ocp.AsyncResponse[None] | None = None

    def finish() -> None:
        nonlocal pending
        if pending is not None:
            pending.result()
            pending = None
        _prune(run_dir, keep)

    def save(step: int, state: Any, data: dict[str, Any]) -> None:
        nonlocal pending
        finish()
        newest = latest_step(run_dir)
        require(
            newest is None or step > newest,
            f"step={step} is not after step {newest} in run_dir='{run_dir}'; restore it, or use another --run-dir",
        )
        # Orbax hangs at a NumPy scalar, and might read a NumPy array after its owner has changed it.
        state = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.array(x), state)
        parts = _parts(state)
        copied = json.loads(json.dumps(data))  # `data` may be the iterator's own dict, which the next batch changes
        path = str(_home(run_dir) / str(step))
        about = seal({"data": copied, "sums": sums(parts)})
        pending = ocp.save_checkpointables_async(path, parts, custom_metadata=about)

    try:
        yield save
    finally:
        finish()


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
    found, data = _load(step_dir(run_dir, step), _parts(abstract_state))
    return abstract_state._replace(**(found.pop("state") | found)), data


def _parts(state: Any) -> dict[str, Any]:
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


class _Base(NamedTuple):
    step: Any
    params: Any


def save_base(run_dir: RunDir, params: PyTree[Array]) -> None:
    """Write, apart from all checkpoints, the parameters that a run does not change; nothing if there are none.

    A run that was stopped before its first checkpoint may have left others, which give way.
    """
    home = pathlib.Path(run_dir) / BASE
    if jax.tree.leaves(params):
        if jax.process_index() == 0:
            shutil.rmtree(home, ignore_errors=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(str(home))
        with saver(home, keep=1) as save:
            save(0, _Base(jnp.int32(0), params), {})


def restore_base(run_dir: RunDir, abstract_params: PyTree) -> PyTree[Array]:
    """What `save_base` wrote.

    Raises:
        InputError: as `restore`.
    """
    none = not jax.tree.leaves(abstract_params)
    return abstract_params if none else restore_params(pathlib.Path(run_dir) / BASE, abstract_params)


def _load(path: pathlib.Path, parts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    from orbax.checkpoint import v1 as ocp

    with _one_line(path):
        about = ocp.checkpointables_metadata(str(path))
        record: Any = about.custom_metadata or {}
        stored = {name: about.metadata.get(name) for name in parts}
    plain = record.keys() == {"data"}  # as 0.1 wrote it, without sums
    whole = None not in stored.values() and (plain or is_sealed(record))
    damaged = f"{path} cannot be read: its metadata is damaged; {EARLIER}"
    _check(whole, damaged)
    stored = {name: kind(leaf) for name, leaf in leaves(stored).items()}
    saved = stored if plain else {n: told.rpartition(" ")[0] for n, told in _sums_of(record, parts).items()}
    _check(saved.keys() == stored.keys(), damaged)
    wanted = {name: kind(leaf) for name, leaf in leaves(parts).items()}
    # A typed key is written as its uint32 data, and given back as the kind that is in the file, whatever is asked for.
    keys = {name: saved[name] for name, told in wanted.items() if plain and told.startswith("key<") and name in saved}
    _require_same(path, saved, wanted | keys)
    with _one_line(path):
        found = ocp.load_checkpointables(str(path), jax.tree.map(_target, parts))
    _require_same(path, {name: kind(leaf) for name, leaf in leaves(found).items()}, wanted)
    for name, told in {} if plain else sums(found).items():
        _check(record["sums"][name] == told, f"{name} of {path} is damaged: its bits are not those saved; {EARLIER}")
    return found, record["data"]


def _require_same(path: pathlib.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Refuse what Orbax would cast without a word, and name what it would refuse in a page."""
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        require(there == here, f"{name} is {there} in {path}, but {here} here; use the configuration it was saved with")


def _sums_of(record: dict[str, Any], parts: dict[str, Any]) -> dict[str, str]:
    return {name: told for name, told in record["sums"].items() if name.split("/")[0] in parts}


def _check(ok: object, message: str) -> None:
    if not ok:
        raise CheckpointError(message)


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    """Orbax reports a damaged file by pages of log, one of many errors and what other reads leave: make it one line."""
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # which say nothing of the file
    except Exception as error:  # of any kind: damage shows as whatever the reader trips over
        if getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE):
            raise
        what = type(error).__name__
        error.__traceback__ = None  # which holds those other reads
        gc.collect()
        raise CheckpointError(f"{path} cannot be read: {what}; {EARLIER}") from None
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _home(run_dir: RunDir) -> pathlib.Path:
    return pathlib.Path(run_dir).absolute() / "checkpoints"  # Orbax refuses relative paths


def saved_steps(run_dir: RunDir) -> list[int]:
    """The steps whose checkpoints are there, in order."""
    return sorted(int(path.name) for path in _home(run_dir).glob("*") if path.name.isdigit())


def step_dir(run_dir: RunDir, step: int | None) -> pathlib.Path:
    """Where the checkpoint of a step (None: the newest) lies.

    Raises:
        InputError: there is no such checkpoint.
    """
    steps = saved_steps(run_dir)
    require(steps, f"run_dir='{run_dir}' holds no checkpoint; train with --run-dir {run_dir} first")
    step = steps[-1] if step is None else step
    require(step in steps, f"step={step} is not in run_dir='{run_dir}'; it has {', '.join(map(str, steps))}")
    return _home(run_dir) / str(step)


def set_aside(run_dir: RunDir, step: int) -> pathlib.Path:
    """Put a checkpoint where nothing looks for one, under its step and the first free number; where it lies then."""
    path = step_dir(run_dir, step)
    names = (path.with_name(f"{step}{ASIDE}{n or ''}") for n in itertools.count())
    return path.rename(next(name for name in names if not name.exists()))


def _prune(run_dir: RunDir, keep: int) -> None:
    """Remove all but the newest steps, and what a kill left unfinished."""
    if jax.process_index() != 0:
        return
    for step in saved_steps(run_dir)[:-keep]:
        path = _home(run_dir) / str(step)
        path.rename(f"{path}{UNFINISHED}")  # a kill during the removal must not leave half a step under its name
    for path in _home(run_dir).glob(f"*{UNFINISHED}"):
        shutil.rmtree(path)


def _target(x: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding Orbax would warn, and use that of the devices it was saved from.
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or SingleDeviceSharding(jax.local_devices()[0]))
