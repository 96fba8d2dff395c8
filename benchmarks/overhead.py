"""What it costs that a run is not lost: a step's check for what is not finite, the report of each, the sums of a save.

    python -m benchmarks.overhead                       # the steps and saves of gpt-shakespeare
    python -m benchmarks.overhead --gigabytes 1         # and how long a save of so much state blocks the loop

Steps with and without the check in turn, medians; the rest as parts of a step at the preset's intervals.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from tx_jax import integrity
from tx_jax.command_line import parse_run
from tx_jax.memory import keep_memory
from tx_jax.run_dir import locked, write_config
from tx_jax.saver import Saver
from tx_jax.training.loop import Run, make_launcher, open_run
from tx_jax.training.optim import make_optimizer
from tx_jax.training.report import Report


@dataclasses.dataclass
class Args:
    preset: str = "gpt-shakespeare"
    rounds: int = 250  # a step of each, in turn
    gigabytes: float = 0.0  # of state that is saved, to see how long it blocks; 0: none


class State(NamedTuple):
    step: Any
    params: Any


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as home:
        if args.gigabytes:
            blocked(args.gigabytes, Path(home) / "large")
        steps(args, Path(home) / "run")


def steps(args: Args, home: Path) -> None:
    """Print what a step costs more with all that is asked of it."""
    cfg = parse_run([args.preset, "--run-dir", str(home)])
    run = open_run(cfg)
    cfg = run.task.cfg
    state = jax.jit(run.start)(jax.random.key(0))
    batch = next(run.batches).batch
    sides = {}
    for name, branch in (("checked", jax.lax.cond), ("unchecked", lambda ok, do, skip, *args: do(*args))):
        with_branch(branch, lambda name=name: sides.update({name: compiled(run, state, batch)}))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (take, held) in sides.items():
            start = time.perf_counter()
            held[0], metrics = take(held[0], batch)
            jax.block_until_ready(metrics)
            times[name].append(time.perf_counter() - start)
    step = statistics.median(times["unchecked"])
    ratios = statistics.quantiles([a / b - 1 for a, b in zip(times["checked"], times["unchecked"], strict=True)])
    moving = run.launch.host_state(sides["checked"][1][0]).moving
    sums = median_of(lambda: integrity.sums(moving)) / cfg.train.save_every
    write_config(home, cfg)
    with Report(cfg, 0, 1) as report:
        told = median_of(lambda: [report.took(1, metrics) for _ in range(cfg.train.log_every)] and report.look())
    with contextlib.ExitStack() as held:
        lock = median_of(lambda: held.enter_context(locked(home)), n=1) / cfg.train.n_steps
    parts = {
        "check": ratios[1] * step,
        "report": told / cfg.train.log_every,
        "sums": sums,
        "lock": lock,
    }
    print(f"step {step * 1e3:.2f} ms; " + ", ".join(f"{name} {part / step:.3%}" for name, part in parts.items()))
    print(f"in all {sum(parts.values()) / step:.3%}; quartiles of the check " + ", ".join(f"{r:+.3%}" for r in ratios))


def with_branch(branch: Any, function: Any) -> None:
    """Call a function while a step is made with another `jax.lax.cond`."""
    before = jax.lax.cond
    jax.lax.cond = branch
    try:
        function()
    finally:
        jax.lax.cond = before


def compiled(run: Run, state: Any, batch: Any) -> tuple[Any, list]:
    """The step's program, and a state of its own for it."""
    cfg = run.task.cfg
    optimizer = make_optimizer(cfg.optim, cfg.train.n_steps, cfg.model.width_ratio)
    launch = make_launcher(cfg, run.model, optimizer, jax.eval_shape(lambda: state), run.mesh)
    held = launch.put_state(jax.tree.map(jnp.copy, state))
    return launch.lower(held, batch).compile(), [held]


def median_of(function: Any, n: int = 5) -> float:
    """Seconds."""
    found = []
    for _ in range(n):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def blocked(gigabytes: float, home: Path) -> None:
    """Print how much of a save the loop waits for."""
    n = int(gigabytes * 1e9 / 4 / 50)
    leaves = {f"{i}": jax.random.normal(jax.random.key(i), (n // 1000, 1000)) for i in range(50)}
    waits, whole = [], []
    with Saver(home, 1) as save:
        for step in range(1, 6):
            start = time.perf_counter()
            save(step, State(jnp.int32(step), leaves), {})
            waits.append(time.perf_counter() - start)
            save.failure(wait=True)
            whole.append(time.perf_counter() - start)
    shares = [wait / all_ for wait, all_ in zip(waits[1:], whole[1:], strict=True)]  # the first compiles
    print(
        f"a save of {gigabytes:g} GB: {statistics.median(whole[1:]):.2f} s, of which the loop waits "
        f"{statistics.median(waits[1:]):.2f} s; shares " + ", ".join(f"{share:.1%}" for share in shares)
    )


if __name__ == "__main__":
    keep_memory()
    main(tyro.cli(Args))
