"""The first five minutes: what there is, what a run would need, and its numbers in a viewer."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from tx_jax.checkpoint import latest_step
from tx_jax.models import count_params
from tx_jax.run_dir import read_config
from tx_jax.run_presets import RUNS
from tx_jax.training import plan, writers

ROOT = Path(__file__).parents[2]


def told(said):
    """The lines of a plan by their first words."""
    return dict(line.split(maxsplit=1) for line in said.splitlines())


def test_train_alone_lists_presets_with_what_they_need(train, capsys):
    train([])
    head, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.split() == ["preset", "parameters", "time", "here", "needs"]
    assert [row.split()[0] for row in rows] == list(RUNS)
    sizes = {row.split()[0]: row.split()[1] for row in rows}
    assert sizes["finetune"] == "134,515,008"
    assert all(re.search(r"~[\d.]+ (s|min|h|days) ", row) for row in rows)


def test_sample_alone_lists_runs_and_models(run, sample, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "unread", "begun"):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "runs" / "unread" / "config.json").write_text("{")
    shutil.rmtree(tmp_path / "runs" / "begun" / "checkpoints")
    sample([])
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    about = {row.split("  ")[0]: row for row in rows}
    assert re.search(r"next_token on .*text.txt, step 40 of 40, validation loss \d\.\d\d$", about["runs/whole"])
    assert re.search(
        r"runs/unread/config.json cannot be read: not JSON \(.*\); .*; use another --run-dir$", about["runs/unread"]
    )
    assert "runs/begun" not in about
    assert "smollm2" in about


@pytest.mark.parametrize("name", ["whole", "hole", "runs/hole", "Whole"])
def test_a_run_is_suggested(name, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "whole").mkdir(parents=True)
    (tmp_path / "runs" / "whole" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        sample([name, "--prompt", "a"])
    assert f"model {name!r} does not exist; did you mean runs/whole? Or give a name (" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--train.scan-layers", "--mesh.tensor", "2"]])
def test_a_dry_run_tells_what_is_needed_and_writes_nothing(run, train, tiny, capsys, tmp_path, more):
    train([*tiny, "--run-dir", str(tmp_path / "new"), "--dry-run", *more])
    head, rest = capsys.readouterr().out.split("\n", 1)
    assert head == f"{tmp_path / 'new'}: 40 steps; nothing is written"
    lines, n = told(rest), f"{count_params(read_config(run).model):,}"
    assert lines["parameters"] == f"{n}, of which {n} are trained"
    assert re.fullmatch(r"[\d.]+ [KM]iB of [\d.]+ GiB a device, with the largest batch", lines["memory"])
    assert re.fullmatch(r"[\d.]+ MFLOP a step, [\d.]+ MFLOP in all", lines["FLOPs"])
    assert re.match(r"[\d.]+ s on 8 × cpu: [\d.]+ µ?m?s a step; validation losses add ", lines["time"])
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_run_that_goes_on(run, train, tiny, capsys):
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    train([*tiny, "--run-dir", str(run), "--dry-run", "--resume", "20"])
    assert f"{run}: goes on after step 20 of 40; nothing is written" in capsys.readouterr().out
    assert before == sorted(path.stat().st_mtime_ns for path in run.rglob("*"))


def test_a_dry_run_refuses_what_the_run_would(run, train, tiny, capsys):
    with pytest.raises(SystemExit, match="2"):
        train([*tiny, "--run-dir", str(run), "--dry-run", "--model.n-layers", "2"])
    assert "holds a run with model.n_layers=1, not 2" in capsys.readouterr().err


def test_what_does_not_fit_is_not_tried(train, tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "memory_limit", lambda: 1000)
    train([*tiny, "--run-dir", str(tmp_path / "new"), "--dry-run"])
    assert "not taken: the step does not fit; see --train.remat" in capsys.readouterr().out


def test_the_memory_of_a_plan_is_that_of_the_state_and_more(train, capsys, tmp_path, text):
    """Adam's state has three numbers for a parameter, and each has a gradient."""
    train(
        ["gpt-shakespeare", "--data.path", str(text), "--data.batch-size", "8", "--run-dir", str(tmp_path), "--dry-run"]
    )
    lines = told(capsys.readouterr().out.split("\n", 1)[1])
    n = int(lines["parameters"].split(", of")[0].replace(",", ""))
    assert 16 * n < float(lines["memory"].split()[0]) * 2**20 < 100 * n


def test_numbers_go_to_tensorboard_too(train, tiny, tmp_path):
    run_dir = tmp_path / "run"
    train([*tiny, "--run-dir", str(run_dir), "--log-to", "tensorboard", "--train.n-steps", "5"])
    (events,) = (run_dir / "tensorboard").iterdir()
    assert all(name in events.read_bytes() for name in (b"loss", b"valid_loss", b"tokens_per_second"))


def test_a_writer_that_fails_is_no_harm(train, tiny, run, tmp_path, capsys, monkeypatch):
    """Somebody may end the process that it speaks to."""

    def gone(*_):
        raise ConnectionResetError("gone")

    monkeypatch.setitem(writers.WRITERS, "wandb", (lambda library, cfg: writers.Writer(gone, gone), "json"))
    train([*tiny, "--run-dir", str(tmp_path / "run"), "--log-to", "wandb"])
    said = capsys.readouterr().out
    assert (
        said.count("WARNING: log_to takes no more numbers (ConnectionResetError('gone')); metrics.jsonl has them") == 1
    )
    assert latest_step(tmp_path / "run") == 40


def test_a_terminal_that_is_gone_is_no_harm(train, tiny, tmp_path, monkeypatch):
    def gone(self):
        raise OSError(errno.EIO, "hung up")

    monkeypatch.setattr(Progress, "stop", gone)
    train([*tiny, "--run-dir", str(tmp_path / "run"), "--train.n-steps", "5"])
    assert latest_step(tmp_path / "run") == 5


@pytest.mark.skipif(shutil.which("bash") is None, reason="what completes is bash itself, which is not there")
@pytest.mark.parametrize(
    ("script", "words", "found"),
    [("train.py", ["gpt-shakespeare", "--optim.peak"], "--optim.peak-lr"), ("sample.py", ["x", "--top"], "--top-k")],
)
def test_a_shell_completes_flags(script, words, found):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script), "--tyro-print-completion", "bash"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=100).stdout
    name, line = f"_tyro_{script.replace('.', '_')}", " ".join([f"./{script}", *words])
    ask = f'COMP_WORDS=({line}); COMP_CWORD=2; {name} ./{script} {words[-1]} {words[0]}; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", told + ask], capture_output=True, text=True, check=True, timeout=100)
    assert found in done.stdout


def test_the_scripts_can_be_started():
    assert all(os.access(ROOT / name, os.X_OK) for name in ("train.py", "sample.py"))
