"""Many processes that are one run, on one host or on many: how they find each other, and what they must agree on.

With one process each of these does nothing but its work.
"""

import argparse
import json
import re
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from tx_jax.errors import InputError, require


def connect(args: list[str]) -> list[str]:
    """The arguments without those that say how processes find each other, which they then have done.

    `--coordinator auto` leaves it to `jax.distributed`, which knows SLURM, Open MPI, MPI, TPU pods and Kubernetes; or
    `--coordinator HOST:PORT --n-processes N --process-id I`, of the first process. To be called before JAX looks for
    devices.

    Raises:
        InputError: a flag is missing, or nothing is found.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--n-processes", type=_count)
    parser.add_argument("--process-id", type=_count)
    found, rest = parser.parse_known_args(args)
    where, n, i = found.coordinator, found.n_processes, found.process_id
    if where is None:
        require(
            (n, i) == (None, None), "--n-processes and --process-id need --coordinator HOST:PORT; or leave them out"
        )
        return rest
    if where != "auto":
        require(re.fullmatch(r".+:\d+", where), f"--coordinator {where} is no HOST:PORT, nor auto; give one of them")
        rule = f"--coordinator {where} needs --n-processes N and --process-id I, from 0 to N - 1, not {n} and {i}"
        require(n is not None and i is not None and i < n, f"{rule}; or use --coordinator auto")
    try:
        jax.distributed.initialize(None if where == "auto" else where, n, i)
    except (ValueError, RuntimeError) as error:
        why = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"--coordinator {where} finds no other processes: {why:.120}; give HOST:PORT") from error
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # for which JAX has put a handler that goes on
    return rest


def _count(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def is_first() -> bool:
    """Whether this process is the one that writes for all."""
    return jax.process_index() == 0


def first_says(function: Callable[[], int]) -> int:
    """What function gives, at least 0, in the first process, which alone calls it; every process is told.

    Raises:
        InputError: it raised one.
    """
    if jax.process_count() == 1:
        return function()
    value, error = -1, None
    if is_first():
        try:
            value = function()
        except InputError as raised:
            error = raised
    value = int(multihost_utils.broadcast_one_to_all(np.int32(value)))
    if error is not None:
        raise error
    require(value >= 0, "process 0 refuses to start, and says why; see there")
    return value


def any_says(number: int) -> int:
    """The highest number of any process, such as 1 for yes."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).max())


def one_says(text: str | None, rather_not: str = "") -> str | None:
    """What a process says, up to 300 bytes: the first that says anything, or anything without `rather_not` in it.

    None: none does.
    """
    if jax.process_count() == 1:
        return text
    mine = np.zeros(300, np.uint8)
    raw = np.frombuffer((text or "").encode()[:300], np.uint8)
    mine[: len(raw)] = raw
    said = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(mine)]
    return min(filter(None, said), key=lambda one: rather_not in one, default=None)


def check_same(fields: dict[str, Any]) -> None:
    """Hold every process to the fields of the first.

    Raises:
        InputError: they differ here, or in another process.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(json.dumps(fields, sort_keys=True).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine))))
    first = multihost_utils.broadcast_one_to_all(np.resize(mine, length))
    theirs = json.loads(np.asarray(first, np.uint8).tobytes()) if not is_first() else fields
    differ = [f"{name}={fields[name]!r}, not {theirs[name]!r}" for name in fields if fields[name] != theirs[name]]
    others = any_says(bool(differ))
    rule = f"process {jax.process_index()} has {', '.join(differ[:3])}, as process 0 has"
    require(not differ, f"{rule}; start all with the same flags")
    require(not others, "another process has other flags, and says which; start all with the same")


def gathered(tree: PyTree) -> PyTree:
    """The whole of every array, in each process."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)
