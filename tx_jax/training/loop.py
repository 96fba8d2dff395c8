"""A training run, from text to checkpoints: read it from top to bottom.

Everything lands in the run directory: config.json, tokenizer/, metrics.jsonl, samples.txt, plots/loss.png and
checkpoints/<step>/. Running the same config again continues at the newest checkpoint; Ctrl-C saves first.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from tx_jax import checkpoint
from tx_jax.config import ModelConfig, RunConfig
from tx_jax.data.batches import Batch, split, train_batches, valid_batches
from tx_jax.data.corpora import load_text
from tx_jax.data.tokenizers import TOKENIZERS, Tokenizer
from tx_jax.decoding.generate import check_tokens, generate
from tx_jax.decoding.samplers import Sampler
from tx_jax.errors import require
from tx_jax.inspect import plot_metrics
from tx_jax.models import Model, build
from tx_jax.parallel import AXIS, Launcher, jit_step, make_mesh, pmap_step
from tx_jax.training.optim import make_optimizer, make_schedule
from tx_jax.training.report import Report
from tx_jax.training.step import TrainState, init_state, make_eval_step, make_train_step


def fit(cfg: RunConfig) -> TrainState:
    """The state after cfg.train.n_steps optimiser steps, or where Ctrl-C stopped it.

    Raises:
        InputError: the text, the configuration and the run directory do not fit together; nothing is overwritten.
    """
    train, run_dir = cfg.train, Path(cfg.run_dir)
    text = load_text(cfg.data.path, cfg.data.corpus)
    tokenizer = TOKENIZERS[cfg.data.tokenizer].train(text)
    cfg = dataclasses.replace(cfg, model=fill_vocabulary(cfg.model, tokenizer))
    train_ids, valid_ids = split(tokenizer.encode(text), cfg.data.valid_fraction)
    shape = {"seq_len": cfg.data.seq_len, "batch_size": cfg.data.batch_size}
    batches = iter(train_batches(train_ids, **shape, seed=train.seed))
    held_out = valid_batches(valid_ids, **shape)
    prompt = tokenizer.encode(train.sample_prompt)[None]
    check_tokens(prompt, tokenizer.vocab_size, "train.sample_prompt")

    model = build(cfg.model)
    optimizer, schedule = make_optimizer(cfg.optim, train.n_steps), make_schedule(cfg.optim, train.n_steps)
    state = jax.eval_shape(lambda key: init_state(model, optimizer, key), jax.random.key(0))
    launch = make_launcher(cfg, model, optimizer, state)
    check_room = launch.put_batch(held_out[0])  # refuses a batch that the devices cannot share, before anything is written
    del check_room
    evaluate = jax.jit(make_eval_step(model))

    checkpoint.claim_run_dir(run_dir, cfg)
    tokenizer.save(run_dir / "tokenizer")
    step = checkpoint.latest_step(run_dir) or 0
    if step:
        state, position = checkpoint.restore(run_dir, state)
        batches.set_state(position)
    else:
        state = jax.jit(init_state, static_argnums=(0, 1))(model, optimizer, jax.random.key(train.seed))
    state = launch.put_state(state)

    with Report(cfg, step) as report, checkpoint.saver(run_dir, train.keep) as save, ctrl_c() as stop:
        while step < train.n_steps and not stop.is_set():
            state, metrics = launch.step(state, launch.put_batch(next(batches)))
            step += 1
            last = step == train.n_steps or stop.is_set()
            if due(step, train.log_every) or step == report.first or last:
                report.training(step, metrics, float(schedule(step - 1)))
            if due(step, train.eval_every) or step == train.n_steps:
                with report.pause():
                    report.validation(step, mean_loss(evaluate, launch, state, held_out))
                    plot_metrics(run_dir)
            if due(step, train.sample_every) or step == train.n_steps:
                with report.pause():
                    key = jax.random.fold_in(jax.random.key(train.seed), step)
                    report.sample(step, sample_text(model, launch.params(state), tokenizer, prompt, train.sample_tokens, key))
            if due(step, train.save_every) or last:
                with report.pause():
                    save(step, launch.host_state(state), batches.get_state())
        report.end(step, stopped=stop.is_set())
    return launch.host_state(state)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0


def fill_vocabulary(cfg: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The config with the tokenizer's vocabulary, if it has none of its own.

    Raises:
        InputError: its own is too small.
    """
    V, needed = cfg.vocab_size or tokenizer.vocab_size, tokenizer.vocab_size
    require(V >= needed, f"model.vocab_size={V} is below the tokenizer's {needed}; leave it out, or raise it")
    return dataclasses.replace(cfg, vocab_size=V)


def make_launcher(cfg: RunConfig, model: Model, optimizer, state: TrainState) -> Launcher:
    """`pmap` where one host has several devices and no mesh is asked for; otherwise `jit`, on the mesh that is."""
    smoothing = cfg.train.label_smoothing_rate
    if cfg.mesh == type(cfg.mesh)() and jax.process_count() == 1 and jax.local_device_count() > 1:
        return pmap_step(make_train_step(model, optimizer, label_smoothing=smoothing, axis_name=AXIS))
    return jit_step(make_train_step(model, optimizer, label_smoothing=smoothing), state, make_mesh(cfg.mesh))


def mean_loss(evaluate, launch: Launcher, state: TrainState, batches: list[Batch]) -> float:
    """Nats per token over all batches."""
    params = launch.params(state)
    sums = [evaluate(params, batch) for batch in batches]
    total, count = np.sum(jax.device_get(sums), axis=0)
    return float(total / count)


def sample_text(model: Model, params: dict, tokenizer: Tokenizer, prompt: np.ndarray, n_tokens: int, key) -> str:
    """The prompt and a continuation of up to n_tokens tokens, at temperature 0.8."""
    room = min(n_tokens, model.cfg.max_len - prompt.shape[1])
    new = generate(model, params, prompt, max_new_tokens=room, sampler=Sampler(temperature=0.8), key=key)
    return tokenizer.decode(np.concatenate([prompt[0], np.asarray(new.tokens[0])]))


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second raises KeyboardInterrupt as usual."""
    stop = threading.Event()

    def handler(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
