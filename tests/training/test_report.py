"""What a run says of steps that stand out, and what it does where nothing can be written."""

import json
import os
import resource

import jax.numpy as jnp
import pytest

from tx_jax.config import ModelConfig
from tx_jax.errors import InputError
from tx_jax.run_config import RunConfig, TrainConfig
from tx_jax.training.report import Report, _Lines, unless_full
from tx_jax.training.step import Metrics


def metrics(loss, skipped=False):
    return Metrics(jnp.float32(loss), jnp.float32(1), jnp.float32(9), jnp.bool_(skipped))


def rows(run_dir):
    return [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_spikes_and_skipped_steps_are_told_by_their_step(tmp_path, capsys):
    cfg = RunConfig(run_dir=str(tmp_path), model=ModelConfig(vocab_size=9))
    with Report(cfg, 0, 1) as report:
        for step in range(1, 101):
            report.took(step, metrics(2.0 + step % 2))
        assert rows(tmp_path) == []
        for step, loss in enumerate([4.9, 5.1, float("nan"), 2.0], 101):
            report.took(step, metrics(loss, skipped=loss != loss))
        report.training(104, metrics(2.0), lambda n_updates: n_updates / 1000)
    spike, skipped, last = rows(tmp_path)
    assert spike == {"step": 102, "spike": pytest.approx(5.1)}
    assert skipped == {"step": 103, "skipped": True}
    assert last["lr"] == 0.102  # of the 103rd update
    out = capsys.readouterr().out
    assert "step   102  spike: loss 5.1000, where 2.5000 is usual" in out
    assert "step   103  skipped: its loss or gradient is not finite; nothing is changed" in out
    with Report(cfg, 103, 1) as report:  # which goes on
        assert rows(tmp_path) == [spike, skipped]
        report.training(104, metrics(2.0), lambda n_updates: n_updates / 1000)
    assert rows(tmp_path)[-1]["lr"] == 0.102


def test_skipped_steps_are_counted_across_a_restart(tmp_path, capsys):
    cfg = RunConfig(run_dir=str(tmp_path), model=ModelConfig(vocab_size=9), train=TrainConfig(max_skipped=4))
    with Report(cfg, 0, 1) as report:
        for step in range(1, 6):
            report.took(step, metrics(2.0, skipped=step != 2))
        report.look()
        report.end(5, stopped=True)
    assert "WARNING: the last 3 steps were skipped; an earlier checkpoint may be better\n" in capsys.readouterr().out
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5").mkdir()
    gives_up = r"^4 steps in a row, 3 to 6, had a loss .* not finite; --resume 2, or an earlier step, with --change"
    with Report(cfg, 5, 1) as report:
        report.took(6, metrics(2.0, skipped=True))
        with pytest.raises(InputError, match=gives_up):
            report.look()
        report.write(cfg.train.n_steps, {"unsaved": "run_dir='runs/test_1'"})
    with Report(cfg, cfg.train.n_steps, 1) as report:
        assert not report.tested
    with Report(cfg, 1, 1) as report:  # further back
        assert (report.n_skipped, report.n_in_a_row) == (1, 1)
        report.end(0, stopped=True)
    assert "step     0  stopped. To sample" in capsys.readouterr().out


def test_lines_wait_for_room(tmp_path):
    lines, limit = _Lines(tmp_path / "lines"), resource.getrlimit(resource.RLIMIT_FSIZE)
    lines.add("one\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limit[1]))  # as on a full disk, half a line can be written
    try:
        lines.add("two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert lines.path.read_text() == "one\n"
    lines.add("three\n")
    assert lines.path.read_text() == "one\ntwo\nthree\n"


def test_only_a_full_disk_is_passed_over():
    with unless_full():
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    with pytest.raises(OSError, match="Bad file descriptor"), unless_full():
        os.write(-1, b"x")
