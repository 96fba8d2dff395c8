"""What a run needs, and how long it takes on this machine, before it begins; nothing is written.

Of a preset by its FLOPs alone, in a line; of one run by compiling its step and taking some (`train.py … --dry-run`).
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tx_jax.complexity.table import of_bytes, si
from tx_jax.complexity.train_flops import make_train_flops
from tx_jax.config import ModelConfig
from tx_jax.data.batches import Batch, PairBatch
from tx_jax.memory import memory_limit, memory_of
from tx_jax.models import count_params
from tx_jax.presets import MODELS
from tx_jax.processes import any_says, check_same, first_says
from tx_jax.run_config import RunConfig
from tx_jax.run_dir import fields_of
from tx_jax.run_presets import RUNS
from tx_jax.training.loop import Run, open_run
from tx_jax.training.peaks import peak_flops
from tx_jax.training.resume import find_step

STEPS = 5  # that are timed, after one that is not
LOOKED_AT = 20  # batches, whose FLOPs are the usual ones
USUAL_MFU = 0.5  # of the presets' small models on two cores: 0.42 to 0.58
USUAL_LENGTH = 0.6  # of the pairs of an encoder-decoder, of the longest: 0.5 to 0.7
INIT = "smollm2-135m"  # what the preset that begins with another model begins with


def list_presets() -> Iterator[str]:
    """A line for each preset, as they are looked at. The times are of a CPU's speed, whose presets are small."""
    yield f"{'preset':<24}{'parameters':>12}  {'time here':>9}  {'needs':<14}"
    backend = jax.default_backend()
    speed = USUAL_MFU * peak_flops() * jax.device_count() if backend == "cpu" else None
    for name, make in RUNS.items():
        cfg = make(backend)
        model = _known(cfg)
        ids = jnp.zeros((cfg.data.batch_size, cfg.data.seq_len), jnp.int32)
        rows, pairs = (ids, ids, ids), model.stack == "encoder_decoder"
        flops = make_train_flops(model)(PairBatch(ids, *rows) if pairs else Batch(*rows)) * cfg.train.n_steps
        seconds = "--dry-run" if speed is None else "~" + clock(flops * (USUAL_LENGTH if pairs else 1) / speed)
        about = (make.__doc__ or "").splitlines()[0]
        needs = ".[hf,gguf]" if cfg.init else ".[translate]" if cfg.data.objective == "translate" else ""
        yield f"{name:<24}{count_params(model):>12,}  {seconds:>9}  {needs:<14}{about}"


def _known(cfg: RunConfig) -> ModelConfig:
    """The model, with as many ids as the preset's text will give it, about."""
    if cfg.init is not None:
        return dataclasses.replace(MODELS[INIT](), dtype=cfg.model.dtype)
    return dataclasses.replace(cfg.model, vocab_size=65 if cfg.data.tokenizer == "char" else cfg.data.vocab_size)


def plan(cfg: RunConfig) -> Iterator[str]:
    """Lines that say what the run needs: parameters, memory, FLOPs, and the time of its steps, of which some are taken.

    Raises:
        InputError: the run directory holds another run, or what `open_run` refuses.
    """
    check_same(fields_of(cfg))
    run = open_run(cfg)
    with contextlib.closing(run.batches):
        cfg, n = run.task.cfg, run.task.cfg.train.n_steps
        done = first_says(lambda: find_step(Path(cfg.run_dir), cfg, run.task.tokenizer))
        yield f"{cfg.run_dir}: {f'goes on after step {done} of {n:,}' if done else f'{n:,} steps'}; nothing is written"
        state = jax.eval_shape(run.start, jax.random.key(0))
        trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        yield f"parameters   {count_params(cfg.model):,}, of which {trained:,} are trained"
        batches = [next(run.batches) for _ in range(LOOKED_AT)]
        usual, most = statistics.mean(batch.flops for batch in batches), max(batches, key=lambda batch: batch.flops)
        start = time.perf_counter()
        make = run.launch.make_state(lambda key: run.layouts.stack(run.start(key)))
        program = run.launch.lower(jax.eval_shape(make, jax.random.key(0)), most.batch).compile()
        compiling, needed, room = time.perf_counter() - start, memory_of(program), memory_limit()
        yield f"memory       {of_bytes(needed)}{f' of {of_bytes(room)}' * bool(room)} a device, with the largest batch"
        yield f"FLOPs        {si(usual)}FLOP a step, {si(usual * (n - done))}FLOP in all"
        if any_says(0 < room < needed):
            remedy = "see --train.remat, --train.accumulate-steps, --mesh.fsdp"
            yield f"time         not taken: the step does not fit; {remedy}"
            return
        seconds = _step_time(program, make(jax.random.key(0)), most.batch) * usual / most.flops
        yield _times(run, done, seconds, compiling)


def _times(run: Run, done: int, seconds: float, compiling: float) -> str:
    """Of the steps that are left, and of the loss of what is held out, whose batches take a third of a step."""
    n, every = run.task.cfg.train.n_steps, run.task.cfg.train.eval_every
    looks = n // every - done // every + (n % every > 0) if every else 0
    evaluating = looks * len(run.task.held_out) / 3 * seconds
    where = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    told = f"time         {clock((n - done) * seconds)} on {where}: {si(seconds)}s a step"
    return f"{told}; validation losses add {clock(evaluating)}, compiling {clock(compiling)}"


def _step_time(program: Any, state: Any, batch: Any) -> float:
    """Seconds, of the median step."""
    times = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, batch))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def clock(seconds: float | int) -> str:
    """A time as people say it.

    >>> [clock(x) for x in (0.04, 42, 150, 9000, 200_000)]
    ['0.0 s', '42 s', '2.5 min', '2.5 h', '2.3 days']
    """
    for unit, size, most in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / size:.{0 if unit == 's' and seconds >= 10 else 1}f} {unit}"
    return f"{seconds / 86_400:.1f} days"
