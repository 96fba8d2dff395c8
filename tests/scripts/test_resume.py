"""A run goes on bit for bit after signals, kills and damage, and only one process at a time writes to it."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tx_jax import load_pretrained
from tx_jax.checkpoint import latest_step, saved_steps
from tx_jax.errors import InputError
from tx_jax.run_dir import locked

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as in test_checkpoint.py


def assert_same_params(run, other):
    one, two = (load_pretrained(path).params for path in (run, other))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, two)


@pytest.fixture
def again(run, tmp_path):
    """A copy of the run, which has checkpoints at 20 and 40."""
    shutil.copytree(run, tmp_path / "again")
    return tmp_path / "again"


def refused(train, capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train([str(arg) for arg in args])
    return capsys.readouterr().err


def damage(run_dir, step):
    """Flip a bit of its arrays."""
    files = (run_dir / "checkpoints" / str(step) / "params").rglob("d/*")
    victim = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 16
    victim.write_bytes(content)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(run, train, child, tiny, tmp_path, capsys, number):
    stopped = tmp_path / "stopped"
    command = [*tiny, "--run-dir", str(stopped)]
    process = child("train.py", *command, "--train.log-every", "1", "--train.sample-every", "1")  # to be in time
    metrics, deadline = stopped / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (128 + number, "")
    assert "stopped and saved; the same command goes on from here" in out
    step = latest_step(stopped)
    assert step == max(json.loads(row)["step"] for row in metrics.read_text().splitlines())
    train(command)
    assert f"continuing after step {step} of 40" in capsys.readouterr().out
    assert_same_params(run, stopped)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(run, train, again, capsys):
    damage(again, 40)
    train([str(again / "config.json"), "--run-dir", str(again)])
    out, err = capsys.readouterr()
    warning, aside = err.splitlines()
    assert warning.startswith("WARNING: ")
    assert warning.endswith(". The run goes on after step 20 if that is whole")
    assert aside == f"step 40 is set aside as {again}/checkpoints/40.aside"
    assert "continuing after step 20 of 40" in out
    assert_same_params(run, again)
    assert (again / "checkpoints" / "40.aside").is_dir()


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(train, again, capsys):
    damage(again, 20)
    config = again / "config.json"
    assert "checkpoints/20" in refused(train, capsys, config, "--run-dir", again, "--resume", "20")
    damage(again, 40)
    assert "checkpoints/20" in refused(train, capsys, config, "--run-dir", again)  # none is whole
    assert saved_steps(again) == [20, 40]


def test_from_a_step_later_ones_are_set_aside(run, train, again, capsys):
    config = str(again / "config.json")
    train([config, "--run-dir", str(again), "--resume", "20"])
    out, err = capsys.readouterr()
    assert err == f"step 40 is set aside as {again}/checkpoints/40.aside\n"
    assert "continuing after step 20 of 40" in out
    assert_same_params(run, again)
    assert json.loads((again / "config.json").read_text())["resume"] == "auto"
    text = refused(train, capsys, config, "--run-dir", again, "--resume", "30")
    assert text == f"error: step=30 is not in run_dir='{again}'; it has 20, 40\n"


def test_never_and_must(train, tiny, again, tmp_path, capsys):
    text = refused(train, capsys, again / "config.json", "--run-dir", again, "--resume", "never")
    assert "resume='never', but run_dir='" in text
    assert "holds a run up to step 40; use another --run-dir" in text
    text = refused(train, capsys, *tiny, "--run-dir", tmp_path / "new", "--resume", "must")
    assert "resume='must', but run_dir='" in text
    assert not (tmp_path / "new").exists()
    text = refused(train, capsys, *tiny, "--run-dir", tmp_path / "new", "--resume", "5.0")
    assert "resume='5.0' is none of auto, never, must, nor the step of a checkpoint" in text
    assert saved_steps(again) == [20, 40]


HOLD = """
import sys
from tx_jax.run_dir import locked
with locked(sys.argv[1]):
    print(flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(train, again, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, again], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}
    text = refused(train, capsys, again / "config.json", "--run-dir", again)
    assert f"run_dir='{again}' is in use by process {holder.pid} on " in text
    assert {path: path.read_bytes() for path in again.rglob("*") if path.is_file()} == before
    holder.kill()  # the lock goes with it
    holder.communicate()
    with locked(again), pytest.raises(InputError, match=r"^run_dir=.* is in use by process"), locked(again):
        pass
    train([str(again / "config.json"), "--run-dir", str(again)])


def test_a_run_that_is_not_finite_gives_up_with_what_is_saved_finite(train, tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    flags = ["--optim.peak-lr", "1e30", "--train.log-every", "4", "--train.save-every", "4", "--train.max-skipped", "6"]
    text = refused(train, capsys, *tiny, *flags, "--run-dir", run_dir)
    assert text.startswith("error: 6 steps in a row, to step 8, had a loss or gradient that is not finite; lower ")
    assert latest_step(run_dir) == 4
    params = load_pretrained(run_dir).params
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "skipped" in row] == [3, 4, 5, 6, 7, 8]
