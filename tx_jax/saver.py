"""Writing checkpoints behind the steps that go on, and which of them stay.

A checkpoint is written under a temporary name and renamed when it is whole, so a kill at any moment leaves the last one
in place. A disk that is full, or fails, costs a run that save and no more: it is told, and may try again.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from tx_jax.checkpoint import (
    BASE,
    CheckpointError,
    RunDir,
    home_of,
    hushed_hooks,
    latest_step,
    parts_of,
    saved_steps,
    valid_losses,
)
from tx_jax.errors import require
from tx_jax.integrity import look, seal
from tx_jax.processes import any_says, is_first, one_says

UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix of what is not whole (orbax TMP_DIR_SUFFIX)
REASONS = re.compile(
    "No space left on device|Disk quota exceeded|File too large|Read-only file system|Input/output error"
)
TIMEOUT = 1200  # seconds that a save may take, as Orbax has it; so long a process waits for another that has failed
LATE = "TimeoutError"  # of such a wait, which does not say why the other has failed


class Saver:
    """A function `save(step, state, data)`, to be used inside a `with`.

    `state` is a NamedTuple of arrays with a field `params`; `data` is what JSON can hold, a Grain iterator's
    `get_state()`. `save` copies both and returns; writing goes on behind the next steps, which may donate the state's
    buffers. It is on disk when the next `save` returns, or at the end of the `with`. What could not be written, because
    it is not finite or the disk has no room or fails, is told by `failure`, and what there is of it removed. Where
    nobody has asked, the next `save` raises it, and does nothing else, or the end of the `with`.

    >>> import collections, tempfile
    >>> from tx_jax.checkpoint import restore
    >>> state = collections.namedtuple("State", "step params")(jnp.int32(7), {"w": jnp.ones(3)})
    >>> with tempfile.TemporaryDirectory() as run_dir:
    ...     with Saver(run_dir, keep=2) as save:
    ...         save(7, state, {"next_index": 21})
    ...     restore(run_dir, state)[1]
    {'next_index': 21}
    """

    def __init__(self, run_dir: RunDir, keep: int, *, keep_every: int = 0, keep_best: bool = False):
        """
        Args:
            keep: the newest checkpoints that stay.
            keep_every: those of steps that are multiples of it stay, too; 0: none.
            keep_best: so does the one of the least `data["valid_loss"]`.
        """
        self.run_dir, self.keep, self.keep_every, self.keep_best = run_dir, keep, keep_every, keep_best
        self.step = 0  # of the last save
        self.pending: Future[None] | None = None  # while it is being written
        self.waiter = ThreadPoolExecutor(1)
        self.untold: str | None = None  # why this process has not saved it
        self.told = False  # by all, that it is not saved
        self.losses: dict[int, float] = {}

    def __enter__(self) -> "Saver":
        self.level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # where Orbax puts pages on what is one line here
        self.hooks = sys.unraisablehook, sys.excepthook
        sys.unraisablehook, sys.excepthook = hushed_hooks(*self.hooks)
        for turn in (True, False):  # the others read what the first process leaves
            if turn == is_first():
                self.losses = valid_losses(self.run_dir) if self.keep_best else {}
                self._tidy()
            any_says(0)  # waits for all
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        failed = self.failure(wait=True) if kind is None else None  # an error may be that of one process alone
        self.waiter.shutdown()
        logging.getLogger("absl").setLevel(self.level)
        sys.unraisablehook, sys.excepthook = self.hooks
        if failed:
            raise self._lost(failed)

    def __call__(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """
        Raises:
            InputError: the step is not after the newest checkpoint.
            CheckpointError: the save before this one could not be written, which nobody has asked about.
        """
        from orbax.checkpoint import v1 as ocp  # here, because `import tx_jax` should be quick

        if failed := self.failure(wait=True):
            raise self._lost(failed)
        newest = latest_step(self.run_dir)
        rule = f"step={step} is not after step {newest} in run_dir='{self.run_dir}'"
        require(newest is None or step > newest, f"{rule}; restore it, or use another --run-dir")
        self.step, self.told = step, False
        self._tidy()
        # Orbax hangs at a NumPy scalar, and might read a NumPy array after its owner has changed it.
        parts = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.array(x), parts_of(state))
        sums, flaws = look(parts)
        self.untold = one_says(self._refusal(parts, flaws))
        if self.untold:
            return
        copied = json.loads(json.dumps(data))  # `data` may be the iterator's own dict, which the next batch changes
        path = str(home_of(self.run_dir) / str(step))
        about = seal({"data": copied, "sums": sums})
        try:
            with ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=TIMEOUT)):
                writing = ocp.save_checkpointables_async(path, parts, custom_metadata=about)
            self.pending = self.waiter.submit(writing.result)  # whose result(timeout=0) may end what is not done
        except OSError as error:
            self.untold = _reason(error)
        if math.isfinite(loss := copied.get("valid_loss", math.nan)):
            self.losses[step] = loss

    @property
    def best(self) -> float:
        """The least validation loss of a checkpoint, the one that is being written too; infinite if none has one."""
        return min(self.losses.values(), default=math.inf)

    def failure(self, *, wait: bool = False) -> str | None:
        """Why the last save is not on disk, told once. None: it is, or without `wait` may still be on its way.

        Of many processes, which must all ask at once, all are told as soon as one of them has failed, or with `wait`
        when all have ended.
        """
        ended = self.pending if self.pending is not None and (wait or self.pending.done()) else None
        if ended is not None:
            error, self.pending = ended.exception(), None
            self.untold = self.untold or (error and _reason(error))
        why, self.untold = one_says(self.untold, rather_not=LATE), None
        told, self.told = self.told, self.told or why is not None
        if why:
            self.losses.pop(self.step, None)
        if ended is not None:
            self._tidy()  # by the losses of what is there
        return f"step {self.step} is not saved in run_dir='{self.run_dir}': {why}" if why and not told else None

    def is_stuck(self) -> bool:
        """Whether a process still waits for one that could not write its part: a save would wait, too."""
        return any_says(self.told and self.pending is not None and not self.pending.done()) > 0

    def _lost(self, failed: str) -> CheckpointError:
        newest = latest_step(self.run_dir)
        kept = "and none before it is" if newest is None else f"and step {newest} is the newest that is"
        return CheckpointError(f"{failed}, {kept}; mend it, and run the same command again")

    def _refusal(self, parts: Any, flaws: list[str]) -> str | None:
        """Why they are not to be saved: one is not finite, or their disk has less room than they would take."""
        if flaws:
            return f"{flaws[0]} is not finite"
        home = home_of(self.run_dir)
        try:
            home.mkdir(parents=True, exist_ok=True)
            os.rmdir(tempfile.mkdtemp(UNFINISHED, dir=home))  # where Orbax can make none, its threads wait for ever
            free = shutil.disk_usage(home).free
        except OSError as error:
            return _reason(error)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
        return f"it needs {needed / 1e6:,.2f} MB, and its disk has {free / 1e6:,.2f} left" if free < needed else None

    def _tidy(self) -> None:
        """Remove steps that are not to stay, and what a kill or a full disk left unfinished; or the next time."""
        if not is_first():
            return
        steps, home = saved_steps(self.run_dir), home_of(self.run_dir)
        stay = {*steps[-self.keep :], *(step for step in steps if self.keep_every and step % self.keep_every == 0)}
        if self.keep_best:
            stay |= set(sorted(self.losses, key=self.losses.__getitem__)[:1])
        with contextlib.suppress(OSError):  # of a disk that fails
            for path in (home / str(step) for step in set(steps) - stay):
                path.rename(f"{path}{UNFINISHED}")  # a kill during the removal must not leave half a step
        for path in home.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)  # a failed save may still be writing there


def _reason(error: BaseException) -> str:
    found = REASONS.search(str(error))
    return found[0] if found else f"{type(error).__name__}: {' '.join(str(error).split()):.160}"


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
        with Saver(home, keep=1) as save:
            save(0, _Base(jnp.int32(0), params), {})
