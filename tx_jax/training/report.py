"""What a run says as it goes: lines and a progress bar for a person, metrics.jsonl and samples.txt for later."""

import contextlib
import errno
import json
import math
import os
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tx_jax.checkpoint import saved_steps
from tx_jax.errors import InputError
from tx_jax.memory import memory_in_use
from tx_jax.models import count_params
from tx_jax.processes import first_says, is_first
from tx_jax.run_config import RunConfig
from tx_jax.run_dir import METRICS, read_metrics
from tx_jax.training.peaks import peak_flops
from tx_jax.training.step import Metrics
from tx_jax.training.writers import NOWHERE, careful, open_writer

TRACED = 5  # steps of a profile
UNREAD = 100  # steps that are looked at together, at most; and whose losses are what is usual
SPIKE = 2.0  # times the median
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # of a disk without room, or that fails


class Ready(NamedTuple):
    """A batch on the devices."""

    batch: Any
    n_tokens: int
    flops: float  # that a step on it needs


class Report:
    """Speaks for one run. Speeds leave out the first step, which compiles, and evaluating, sampling and saving."""

    def __init__(self, cfg: RunConfig, step: int, n_trained: int):
        self.cfg, self.first, self.n_trained = cfg, step + 1, n_trained
        self.run_dir = Path(cfg.run_dir)
        self.peak = peak_flops()
        self.n_tokens, self.flops, self.waited = 0, 0.0, 0.0  # since the last report
        self.unread: list[tuple[int, Metrics]] = []  # steps that were taken since then
        self.losses: deque[float] = deque(maxlen=UNREAD)
        self.quiet = not is_first()  # that process speaks for all
        self.console = _Console(quiet=self.quiet, highlight=False, soft_wrap=True, force_jupyter=False)
        shown = "step", MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        columns = *shown, "ETA", TimeRemainingColumn()
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("compiling …", total=cfg.train.n_steps, completed=step)
        self.tracing: int | None = None  # the first step of a trace that is being taken
        rows = [] if self.quiet else _cut(self.run_dir, step)
        skipped = {row["step"] for row in rows if "skipped" in row}
        self.n_skipped = first_says(lambda: len(skipped))
        self.n_in_a_row = first_says(lambda: next(n for n in range(step + 1) if step - n not in skipped))
        ended = [name for row in rows if row["step"] == cfg.train.n_steps for name in row]
        self.tested = first_says(lambda: any(name.startswith("test_") for name in ended))  # by a run before
        files = (METRICS, "samples.txt")
        self.metrics, self.samples = (_Lines(Path(os.devnull) if self.quiet else self.run_dir / name) for name in files)
        self.metrics.path.touch()
        self.writer = NOWHERE
        first_says(self._open_writer)
        self.since, self.done = time.perf_counter(), step  # of the speed being measured

    def __enter__(self) -> "Report":
        cfg, n = self.cfg, count_params(self.cfg.model)
        devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
        of = "" if self.cfg.init is None else f" of {self.cfg.init}"
        adapters = f" and {self.n_trained:,} in adapters, which are trained" if self.cfg.lora.rank else ""
        most = "up to " * (cfg.data.objective == "translate")
        speed = f"{most}{cfg.data.batch_size * cfg.data.seq_len:,} tokens a step, on {devices}"
        self.line(f"{n:,} parameters{of}{adapters}, {speed}, in {self.run_dir}/")
        if self.first > 1:
            self.line(f"continuing after step {self.first - 1} of {cfg.train.n_steps}")
        self.bar.start()
        self.since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.trace(None)
        with unless_full():  # a terminal that is gone
            self.bar.stop()
        self.writer.close()
        for lines in (self.metrics, self.samples):
            if lines.waiting:
                lines.add("")

    def line(self, text: str) -> None:
        """One line for a person."""
        with unless_full():  # where standard output is a file
            self.console.print(text, markup=False)

    def next(self, batches: Iterator[Ready]) -> Any:
        """The next batch, which is counted, and the time that the step waits for it."""
        start = time.perf_counter()
        batch, n_tokens, flops = next(batches)
        self.waited += time.perf_counter() - start
        self.n_tokens, self.flops = self.n_tokens + n_tokens, self.flops + flops
        return batch

    def trace(self, step: int | None) -> None:
        """With cfg.profile, what the devices do in the TRACED steps from this one on, if it is the second.

        None: those steps are the last.
        """
        if self.cfg.profile and step == self.first + 1:
            jax.profiler.start_trace(self.run_dir / "profile")
            self.tracing = step
        elif self.tracing is not None and (step is None or step == self.tracing + TRACED):
            jax.profiler.stop_trace()
            self.tracing = None
            self.line(f"the trace of {TRACED} steps is in {self.run_dir}/profile: tensorboard --logdir {self.run_dir}")

    def took(self, step: int, metrics: Metrics) -> None:
        """A step that was taken: it is looked at with the next report, or the hundredth after it."""
        self.unread.append((step, metrics))
        if len(self.unread) >= UNREAD:
            self.look()

    def look(self) -> None:
        """Tell of steps that were skipped, and of losses that stand out: a step says which batch it was.

        Raises:
            InputError: cfg.train.max_skipped steps in a row were skipped.
        """
        for step, metrics in jax.device_get(self.unread):
            usual = statistics.median(self.losses) if len(self.losses) == self.losses.maxlen else math.inf
            self.n_in_a_row = self.n_in_a_row + 1 if metrics.skipped else 0
            self.n_skipped += int(metrics.skipped)
            if metrics.skipped:
                self.write(step, {"skipped": True})
                self.line(f"step {step:>5}  skipped: its loss or gradient is not finite; nothing is changed")
            elif metrics.loss > SPIKE * usual:
                self.write(step, {"spike": float(metrics.loss)})
                self.line(f"step {step:>5}  spike: loss {metrics.loss:.4f}, where {usual:.4f} is usual")
            if not metrics.skipped:
                self.losses.append(float(metrics.loss))
            self._give_up(step)
        self.unread.clear()

    def _give_up(self, step: int) -> None:
        n = self.n_in_a_row
        if n >= self.cfg.train.max_skipped:
            before = [saved for saved in saved_steps(self.run_dir) if saved <= step - n]
            back = "use another --run-dir"
            if before:
                back = f"--resume {before[-1]}, or an earlier step, with --change optim.peak-lr"
            rule = f"{n} steps in a row, {step - n + 1} to {step}, had a loss or gradient that is not finite"
            raise InputError(f"{rule}; {back} and a lower --optim.peak-lr")

    def training(self, step: int, metrics: Metrics, schedule: Callable[[int], Any]) -> None:
        """The last training step, and the speed since the last report."""
        self.look()
        lr = float(schedule(step - 1 - self.n_skipped))  # by the updates, which skipped steps are not
        loss, norm = float(metrics.loss), float(metrics.grad_norm)  # waits for the device
        seconds = time.perf_counter() - self.since
        if step == self.first:
            self.line(f"first step, with its compilation: {seconds:.1f} s")
        left, n_devices = (self.cfg.train.n_steps - step) * seconds / (step - self.done), jax.device_count()
        speed = {
            "tokens_per_second": self.n_tokens / seconds,
            "mfu": self.flops / seconds / (self.peak * n_devices),
            "data_wait": self.waited / seconds,
            "memory_bytes": memory_in_use(),
        }
        self.since, self.done, self.n_tokens, self.flops, self.waited = time.perf_counter(), step, 0, 0.0, 0.0
        record = {"loss": loss, "lr": lr, "grad_norm": norm}
        self.write(step, record if step == self.first else record | speed)
        text = (
            f"loss {loss:.4f}  lr {lr:.2e}  grad {norm:.2f}  {speed['tokens_per_second'] / n_devices:,.0f} tokens/s"
            f"{'/device' * (n_devices > 1)}  MFU {speed['mfu']:.0%}  {speed['memory_bytes'] / 2**30:.1f} GiB"
            f"  data wait {speed['data_wait']:.1%}"
        )
        self.bar.update(self.task, completed=step, description=text)
        if not self.console.is_terminal:
            eta = "" if step == self.first else f"  ETA {_clock(left)}"
            self.line(f"step {step:>5}/{self.cfg.train.n_steps}  {text}{eta}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """The loss over the whole validation split, and the scores of a part of it."""
        self.write(step, values)
        (_, loss), *scores = values.items()
        rest = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in scores)
        self.line(f"step {step:>5}  validation loss {loss:.4f} nats/token{rest}")

    def test(self, step: int, scores: dict[str, float]) -> None:
        """The scores of the whole test split, if there is one."""
        if scores:
            self.write(step, {f"test_{name}": value for name, value in scores.items()})
            told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self.line(f"step {step:>5}  test: {told}")

    def sample(self, step: int, text: str) -> None:
        """A text that the model wrote."""
        self.samples.add(f"=== step {step}\n{text}\n\n")
        self.line(f"step {step:>5}  sample\n" + "\n".join(f"    {row}" for row in text.strip().splitlines()))

    def end(self, step: int, *, stopped: bool) -> None:
        """Where the run stands, and what to do next."""
        without = "" if self.cfg.resume in ("auto", "must") else ", without --resume,"
        saved = f"stopped and saved; the same command{without} goes on from here" if step else "stopped"
        again = saved if stopped else "done"
        if self.n_in_a_row:
            self.line(f"WARNING: the last {self.n_in_a_row} steps were skipped; an earlier checkpoint may be better")
        asked = {"decoder": "", "encoder_decoder": " --source TEXT"}.get(self.cfg.model.stack)
        sample = "" if asked is None else f" To sample: python sample.py {self.run_dir}{asked}"
        self.line(f"step {step:>5}  {again}.{sample}")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One record of metrics.jsonl, without what is not finite, for which JSON has no word."""
        values = {name: x for name, x in values.items() if not isinstance(x, float) or math.isfinite(x)}
        self.metrics.add(json.dumps({"step": step} | values) + "\n")
        self.writer.add(step, {name: float(x) for name, x in values.items() if not isinstance(x, str)})

    def _open_writer(self) -> int:
        self.writer = careful(open_writer(self.cfg), self.line)
        return 0

    def unsaved(self, step: int, why: str, *, then: str = "The run goes on, and tries again") -> None:
        """A checkpoint that could not be written, as is known at this step."""
        self.write(step, {"unsaved": why})
        self.line(f"WARNING: {why}. {then}")

    @contextlib.contextmanager
    def pause(self, metrics: Metrics) -> Iterator[None]:
        """Time spent inside does not count as training; the steps up to that of `metrics` do."""
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


class _Console(Console):
    """A run goes on when who reads what it says has gone, as tee goes by the Ctrl-C that asks the run to save."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # or Python's last flush would complain


class _Lines:
    """A file that grows by whole lines. What a full disk does not take is kept, and goes with the next."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, ""

    def add(self, text: str) -> None:
        self.waiting += text
        size = self.path.stat().st_size if self.path.exists() else 0
        with unless_full():
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(self.waiting)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # no part of a line stays
                raise
            self.waiting = ""


@contextlib.contextmanager
def unless_full() -> Iterator[None]:
    """What a disk without room refuses is left undone; checkpoints, which are not to be left so, say it."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise


def _cut(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, which it and samples.txt keep, up to `step`: later steps will be taken again."""
    path, samples = run_dir / METRICS, run_dir / "samples.txt"
    if samples.exists():
        heads = re.finditer(rb"^=== step (\d+)$", samples.read_bytes(), re.MULTILINE)
        ends = [head.start() for head in heads if int(head[1]) > step]
        os.truncate(samples, min(ends, default=samples.stat().st_size))
    if not path.exists():
        return []
    rows = [row for row in read_metrics(run_dir) if row["step"] <= step]
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    new.replace(path)
    return rows


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
