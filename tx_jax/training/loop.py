"""A training run, from data to checkpoints: read it from top to bottom.

Everything lands in the run directory: config.json, tokenizer/, metrics.jsonl, samples.txt, plots/loss.png and
checkpoints/<step>/. Running the same config again continues at the newest checkpoint; Ctrl-C and SIGTERM save.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tx_jax.complexity.train_flops import make_train_flops
from tx_jax.convert.sources import load_pretrained
from tx_jax.inspect.plots import save_metrics
from tx_jax.memory import trim_memory
from tx_jax.models import Model, build
from tx_jax.parallel import AXIS, Launcher, check_batch, check_mesh, jit_step, make_mesh, placed, pmap_step, rows_here
from tx_jax.processes import any_says, check_same, first_says, gathered, is_first
from tx_jax.run_config import MeshConfig, RunConfig
from tx_jax.run_dir import fields_of, locked
from tx_jax.saver import Saver, save_base
from tx_jax.stacked import stack_layers, unstack_layers
from tx_jax.training.optim import make_optimizer, make_schedule
from tx_jax.training.report import Ready, Report, unless_full
from tx_jax.training.resume import find_step, identity, resume, settle
from tx_jax.training.start import first_state, make_assemble
from tx_jax.training.step import Metrics, TrainState, make_eval_step, make_train_step
from tx_jax.training.stopping import Stop, stopping
from tx_jax.training.tasks import Task, open_task
from tx_jax.training.writers import find_library

if TYPE_CHECKING:
    import grain

TRIES, PATIENCE = 60, 10  # of a last save that fails; seconds
ASK_EVERY = 10  # steps: many processes wait for each other as they ask whether one of them is to stop


def fit(cfg: RunConfig, stop: Stop | None = None) -> TrainState:
    """The state after cfg.train.n_steps optimiser steps, or where a signal stopped it.

    Args:
        stop: is told which one did.

    Raises:
        InputError: the text, the configuration and the run directory do not fit together, or another process is using
            the directory; nothing is overwritten.
    """
    with contextlib.ExitStack() as held:
        check_same(fields_of(cfg))
        first_says(lambda: held.enter_context(locked(cfg.run_dir)))
        return _fit(cfg, stop or Stop())


class Run(NamedTuple):
    """What a run computes with."""

    task: Task
    mesh: Mesh | None
    model: Model
    launch: Launcher
    layouts: "Layouts"
    start: Callable[..., TrainState]  # (key, params or None) → the state before the first step
    batches: Any  # without end


def _fit(cfg: RunConfig, stop: Stop) -> TrainState:
    run = open_run(cfg)
    task, train = run.task, run.task.cfg.train
    with contextlib.closing(run.batches):
        step, state = begin(run)
        with Report(task.cfg, step, sum(leaf.size for leaf in jax.tree.leaves(state.params))) as report:
            step, state = take_steps(run, report, step, state, stop)
            if step == train.n_steps and task.test is not None and not report.tested:
                params = gathered(load_pretrained(cfg.run_dir, mesh=run.mesh).params)  # as sample.py loads them
                report.test(step, task.test(run.model, params))
            report.end(step, stopped=step < train.n_steps)
    return run.layouts.unstack(run.launch.host_state(state))


def open_run(cfg: RunConfig) -> Run:
    """All that can be refused of a run, but for what its directory holds; nothing is written."""
    first_says(lambda: find_library(cfg) is not None)
    mesh = choose_mesh(cfg.mesh)
    task = open_task(cfg, rows_here(mesh, cfg.data.batch_size))
    cfg, train = task.cfg, task.cfg.train
    model = build(cfg.model, train.remat)
    optimizer = make_optimizer(cfg.optim, train.n_steps, cfg.model.width_ratio)
    layouts = make_layouts(cfg)
    start = functools.partial(first_state, cfg.lora, model, optimizer, ema=cfg.keeps_mean)
    shapes = jax.eval_shape(layouts.stack, jax.eval_shape(start, jax.random.key(0)))
    if mesh is not None:
        check_mesh(mesh, cfg.model)
    launch = make_launcher(cfg, model, optimizer, shapes, mesh)
    check_batch(cfg.data.batch_size, launch.n_parts, train.accumulate_steps)
    launch.put_batch(task.held_out[0])  # refuses what else the devices cannot share
    flops_of = make_train_flops(cfg.model, adapters=cfg.lora.rank > 0)
    batches = prefetch(task.batches, lambda batch: Ready(launch.put_batch(batch), batch.n_tokens, flops_of(batch)))
    return Run(task, mesh, model, launch, layouts, start, batches)


def begin(run: Run) -> tuple[int, TrainState]:
    """The steps that are done, and the state after them: of a checkpoint, or of a new run. Its batches follow them."""
    task, launch = run.task, run.launch
    cfg, run_dir, state = task.cfg, Path(task.cfg.run_dir), None
    step = first_says(lambda: find_step(run_dir, cfg, task.tokenizer))
    if step:
        shapes = jax.eval_shape(run.start, jax.random.key(0))
        shapes = shapes if run.mesh is None else placed(shapes, run.mesh)
        step, state, position = resume(run_dir, cfg, shapes, step, identity(cfg, task.tokenizer, task.sha256))
        if position is not None:
            run.batches.set_state(position)
    first_says(lambda: settle(run_dir, cfg, task.tokenizer))
    if step:
        return step, launch.make_state(run.layouts.stack)(state)
    params = None if task.load is None else task.load(run.mesh)
    first = lambda params, key: run.layouts.stack(run.start(key, params))  # noqa: E731
    first = launch.make_state(first, donate_argnums=() if cfg.train.scan_layers else 0)
    state = first(params, jax.random.key(cfg.train.seed))
    save_base(run_dir, launch.host_state(state.frozen))
    return step, state


def take_steps(run: Run, report: Report, step: int, state: TrainState, stop: Stop) -> tuple[int, TrainState]:
    """Take steps up to the last, or to a signal, and log, evaluate, sample and save between them."""
    task, launch, batches = run.task, run.launch, run.batches
    cfg, train = task.cfg, task.cfg.train
    schedule, about = make_schedule(cfg.optim, train.n_steps), identity(cfg, task.tokenizer, task.sha256)
    look = make_look(run, report)

    def failed(wait: bool, **then: str) -> bool:
        if why := save.failure(wait=wait):
            report.unsaved(step, why, **then)
        return why is not None

    def keep() -> None:
        with report.pause(metrics):
            failed(wait=True)  # the save before this one
            data = {"batches": batches.get_state()} | about | found
            save(step, run.layouts.unstack(launch.host_state(state.moving)), data)
            if is_first():
                with unless_full():
                    save_metrics(Path(cfg.run_dir))
            trim_memory()

    saver = Saver(cfg.run_dir, train.keep, keep_every=train.keep_every, keep_best=train.keep_best)
    with stopping(stop), saver as save:
        last, owed, found = step == train.n_steps or asked(stop), False, {}
        while not last:
            batch = report.next(batches)
            report.trace(step + 1)
            state, metrics = launch.step(state, batch)
            step += 1
            report.took(step, metrics)
            logs, saves = due(step, train.log_every) or step == report.first, due(step, train.save_every)
            stops = (jax.process_count() == 1 or logs or saves or due(step, ASK_EVERY)) and asked(stop)
            last = stops or step == train.n_steps  # which is always saved
            if logs or last:
                report.training(step, metrics, schedule)
                owed |= failed(wait=False)
            found = {} if stops else look(step, state, metrics)
            best = train.keep_best and found.get("valid_loss", math.inf) < save.best
            if saves or last or best or (owed and logs):
                report.look()
                failed(wait=False)
                # After skipped steps it would push out what is from before them.
                owed = not last and (report.n_in_a_row > 0 or save.is_stuck())
                if not owed:
                    keep()
            if stops:
                look(step, state, metrics)  # whoever has asked may not wait for it
        for _ in range(TRIES if step == train.n_steps else 0):  # there is no later save
            if asked(stop) or not failed(wait=True, then="The run waits for room, and tries again; Ctrl-C gives up"):
                break
            time.sleep(PATIENCE)
            keep()
    return step, state


def make_look(run: Run, report: Report) -> Callable[[int, TrainState, Metrics], dict[str, float]]:
    """(step, state, its metrics) → the losses over what is held out, if they are due; a sample is logged, if it is."""
    task, launch = run.task, run.launch
    cfg, train = task.cfg, task.cfg.train
    evaluate, assemble = launch.make_eval(make_eval_step(run.model)), make_assemble(cfg.lora)

    def look(step: int, state: TrainState, metrics: Metrics) -> dict[str, float]:
        def whole() -> dict:
            parts = state.ema if cfg.keeps_mean else state.params, state.frozen
            return assemble(*run.layouts.unstack(launch.host_state(parts)))

        found: dict[str, float] = {}
        if due(step, train.eval_every, train.n_steps):
            with report.pause(metrics):
                params = whole()
                found = losses(evaluate, params, task)
                report.validation(step, found | task.score(run.model, gathered(params)))
        if due(step, train.sample_every, train.n_steps):
            with report.pause(metrics):
                key = jax.random.fold_in(jax.random.key(train.seed), step)
                report.sample(step, task.sample(run.model, gathered(whole()), key))
        return found

    return look


def prefetch(batches: "grain.IterDataset", ready: Callable[[Any], Ready]) -> Any:
    """An iterator over batches that are on the devices before they are asked for; its state is that of the last."""
    from grain import experimental

    return iter(experimental.ThreadPrefetchIterDataset(batches.map(ready), prefetch_buffer_size=2))


class Layouts(NamedTuple):
    """State to state: with the layers as the step has them, and as checkpoints and everything else do."""

    stack: Callable[[Any], Any] = lambda state: state
    unstack: Callable[[Any], Any] = lambda state: state


def make_layouts(cfg: RunConfig) -> Layouts:
    """Those of the config."""
    if not cfg.train.scan_layers:
        return Layouts()
    return Layouts(functools.partial(stack_layers, period=len(cfg.model.window_pattern)), jax.jit(unstack_layers))


def asked(stop: Stop) -> bool:
    """Whether a signal has come to any process; all then end with its code."""
    said = any_says(stop.number)  # while it waits for others, a signal may come
    stop.number = stop.number or said
    return said > 0


def due(step: int, every: int, end: int | None = None) -> bool:
    """Whether something that happens every so many steps, and at the end if one is given, happens now; 0 is never."""
    return every > 0 and (step % every == 0 or step == end)


def choose_mesh(cfg: MeshConfig) -> Mesh | None:
    """The mesh to run on, or None where one host has several devices and none is asked for: then by `pmap`."""
    by_pmap = cfg == MeshConfig() and jax.process_count() == 1 and jax.local_device_count() > 1
    return None if by_pmap else make_mesh(cfg)


def make_launcher(cfg: RunConfig, model: Model, optimizer, state: TrainState, mesh: Mesh | None) -> Launcher:
    """`jit` on the mesh, or `pmap` without one."""
    train = cfg.train
    how = {
        "label_smoothing": train.label_smoothing_rate,
        "z_loss_rate": train.z_loss_rate,
        "balance_rate": train.balance_rate,
        "router_z_rate": train.router_z_rate,
        "ema_rate": train.ema_rate,
        "accumulate_steps": train.accumulate_steps,
        "assemble": make_assemble(cfg.lora),
    }
    if mesh is None:
        return pmap_step(make_train_step(model, optimizer, **how, axis_name=AXIS))
    return jit_step(make_train_step(model, optimizer, **how), state, mesh)


def losses(evaluate, params: dict, task: Task) -> dict[str, float]:
    """Over all that is held out, nats per token and, where they are of one text, bits per byte."""
    # One at a time: on CPU, programs of many devices that run at once can wait for each other for ever.
    sums = [jax.device_get(evaluate(params, task.held_out[i])) for i in range(len(task.held_out))]
    total, count = np.sum(sums, axis=0)
    bits = {} if task.n_bytes is None else {"bits_per_byte": float(total / np.log(2) / task.n_bytes)}
    return {"valid_loss": float(total / count)} | bits
