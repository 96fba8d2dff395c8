"""A run ends as if nothing had been: kills, signals, full disks, second starts, other numbers of devices."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from trials import FULL, trials

from tx_jax import load_pretrained
from tx_jax.checkpoint import latest_step, saved_steps
from tx_jax.convert.sources import open_source
from tx_jax.training.stopping import HEARD

HERE = Path(__file__).parent
N_STEPS = 401 if FULL else 101
SAVING = ("--train.save-every", "4")
FAMILIES = {  # of each stack, with dropout
    "gpt": "--model.positions learned --model.biases all",
    "llama": "--model.mlp swiglu --model.norm rmsnorm --model.n-kv-heads 1 --data.objective next_token",
    "translator": "",
}
SMALL = """--data.batch-size 8 --model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.dropout-rate 0.3
    --optim.warmup-steps 2 --optim.peak-lr 1e-2 --train.n-steps 12 --train.save-every 4
    --train.log-every 1 --train.eval-every 6 --train.sample-every 0"""


def records(run_dir):
    """Those of metrics.jsonl that do not tell of time, with floats to the last bit."""
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "lr", "valid_loss", "skipped", "spike")
    return [{name: float(row[name]).hex() for name in names if name in row} for row in rows]


def assert_same_run(run, other):
    one, two = (load_pretrained(path).params for path in (run, other))
    for a, b in zip(*map(leaves, (one, two)), strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(tree):
    return [leaf for part in tree.values() for leaf in (leaves(part) if isinstance(part, dict) else [part])]


def wait_for(process, run_dir, n_rows):
    """Until metrics.jsonl has so many records."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") >= n_rows):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def environment(n_devices=1):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={n_devices}")
    return os.environ | {"PYTHONPATH": str(HERE.parents[1]), "XLA_FLAGS": flags}


@pytest.fixture
def start(tiny):
    """A run of some seconds in a process of its own, on one device."""
    started = []

    def begin(run_dir, *more, log=subprocess.PIPE):
        flags = f"--train.log-every 1 --train.eval-every 0 --train.sample-every 0 --train.n-steps {N_STEPS}"
        command = [sys.executable, HERE.parents[1] / "train.py", *tiny, *flags.split(), "--run-dir", run_dir, *more]
        command = [str(part) for part in command]
        started.append(subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment()))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def unbroken(tiny, tmp_path_factory):
    """The same run, in peace."""
    home = tmp_path_factory.mktemp("unbroken") / "run"
    process = next(start.__wrapped__(tiny))(home, "--train.save-every", "0")
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    return home


def test_killed_again_and_again(start, unbroken, tmp_path):
    run_dir = tmp_path / "run"
    rng, last = random.Random(0), 0
    for trial in trials(1, 25):
        process = start(run_dir, *SAVING)
        wait_for(process, run_dir, last + 5)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        out, _ = process.communicate()
        assert trial == 0 or f"continuing after step {last} of {N_STEPS}" in out
        newest = latest_step(run_dir) or 0
        assert newest >= last
        last = newest
        for step in saved_steps(run_dir):
            open_source(run_dir, step).load(None, None)
    process = start(run_dir, *SAVING)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [str(N_STEPS - 1), str(N_STEPS)]
    assert_same_run(run_dir, unbroken)
    assert records(run_dir) == records(unbroken)


@pytest.mark.parametrize("seed", trials(1, 20))
def test_signals_at_any_moment(start, tmp_path, seed):
    run_dir = tmp_path / "run"
    rng, number = random.Random(seed), (signal.SIGTERM, signal.SIGINT)[seed % 2]
    process = start(run_dir, "--train.n-steps", "9000", "--train.save-every", "9000")
    wait_for(process, run_dir, 1)
    time.sleep(rng.uniform(0, 1))
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (128 + number, HEARD.decode())
    assert latest_step(run_dir) == len(records(run_dir)) < 9000
    open_source(run_dir).load(None, None)


def test_a_second_start_is_refused_while_the_first_goes_on(start, unbroken, tmp_path):
    run_dir = tmp_path / "run"
    first = start(run_dir, *SAVING)
    wait_for(first, run_dir, 1)
    left = len(trials(1, 20))
    while left:
        if first.poll() is not None:  # it is done: again
            assert_same_run(run_dir, unbroken)
            shutil.rmtree(run_dir)
            first = start(run_dir, *SAVING)
            wait_for(first, run_dir, 1)
        since = time.monotonic()
        second = start(run_dir, *SAVING)
        out, err = second.communicate(timeout=100)
        if second.returncode == 0 and first.poll() is not None:  # in the meantime
            continue
        left -= 1
        assert (second.returncode, out) == (2, "")
        assert f"is in use by process {first.pid} on " in err
        assert time.monotonic() - since < (3 if FULL else 60)
    first.communicate(timeout=100)
    assert first.returncode == 0
    assert_same_run(run_dir, unbroken)
    assert records(run_dir) == records(unbroken)


def test_without_room_a_run_goes_on(run, train, tiny, tmp_path, capsys, monkeypatch):
    usage, asked = shutil.disk_usage(tmp_path), []

    def none_at_first(path):
        asked.append(path)
        return usage._replace(free=0 if len(asked) < 3 else usage.free)

    monkeypatch.setattr(shutil, "disk_usage", none_at_first)
    run_dir = tmp_path / "run"
    train([*tiny, "--run-dir", str(run_dir)])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(told) == 2
    assert told[0].startswith(f"WARNING: step 20 is not saved in run_dir='{run_dir}': it needs 0.04 MB")
    assert told[0].endswith(" 0.00 left. The run goes on, and tries again")
    assert "WARNING: step 25 is not saved" in told[1]  # it is told, and tried again, with the next report
    assert saved_steps(run_dir) == [30, 40]
    assert_same_run(run_dir, run)


@contextlib.contextmanager
def small_disk(where, size):
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk can be made here: {done.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.parametrize("seed", trials(1, 5))
def test_a_disk_that_fills_and_is_emptied(start, unbroken, tmp_path, seed):
    with small_disk(tmp_path / "disk", "2m") as disk, (tmp_path / "log").open("w+") as log:
        run_dir, filler = disk / "run", disk / "filler"
        process = start(run_dir, *SAVING, log=log)
        wait_for(process, run_dir, 5 + 3 * seed)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        deadline = time.monotonic() + 60
        while "WARNING" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        told = (tmp_path / "log").read_text()
        assert "is not saved in run_dir=" in told
        newest = latest_step(run_dir)
        open_source(run_dir).load(None, None)
        filler.unlink()
        assert process.wait(timeout=600) == 0
        assert latest_step(run_dir) == N_STEPS > newest
        assert not list((run_dir / "checkpoints").glob("*tmp*"))
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert_same_run(run_dir, unbroken)
        assert [row for row in records(run_dir) if len(row) > 1] == records(unbroken)


FIT = """
import sys
from tx_jax.command_line import keep_compiled, parse_run
from tx_jax.training import loop
ahead, last, *args = sys.argv[1:]
asked = iter(range(10**6))  # before the first step, and after each
loop.asked = lambda stop: next(asked) == int(last)
if ahead == "0":
    loop.prefetch = lambda batches, ready: iter(batches.map(ready))
keep_compiled()
loop.fit(parse_run(args))
"""


def fit(run_dir, family, text, *, ahead, last=1000, n_devices=1, more=()):
    """A run in a process of its own, that ends after so many steps."""
    preset = "gpt-shakespeare --data.seq-len 16 --data.path"
    if family == "translator":
        preset, text = "number-words", "--data.test-fraction=0.002"
    args = [*preset.split(), text, *FAMILIES[family].split(), *SMALL.split(), "--run-dir", run_dir, *more]
    command, how = [sys.executable, "-c", FIT, ahead, last, *args], {"check": True, "capture_output": True}
    subprocess.run([str(part) for part in command], env=environment(n_devices), timeout=200, **how)


@pytest.mark.parametrize("ahead", [0, 2] if FULL else [2])
@pytest.mark.parametrize("family", FAMILIES if FULL else ["llama"])
def test_bit_for_bit_from_any_step(tmp_path, text, family, ahead):
    """`ahead` batches are made by a thread before they are asked for."""
    fit(tmp_path / "unbroken", family, text, ahead=ahead)
    assert len(records(tmp_path / "unbroken")) >= 14
    for last in (1, 6, 11) if FULL else (5,):
        run_dir = tmp_path / f"stopped_{last}"
        fit(run_dir, family, text, ahead=ahead, last=last)
        assert latest_step(run_dir) == last
        fit(run_dir, family, text, ahead=ahead)
        assert sums_of(run_dir) == sums_of(tmp_path / "unbroken")
        assert records(run_dir) == records(tmp_path / "unbroken")


def sums_of(run_dir):
    """Of every leaf of the last checkpoint, the optimiser's and the random key too, and its place in the data."""
    from orbax.checkpoint import v1 as ocp

    path = run_dir / "checkpoints" / str(latest_step(run_dir))
    record = ocp.checkpointables_metadata(str(path)).custom_metadata
    return record["sums"], record["data"]["batches"]


@pytest.mark.skipif(not FULL, reason="tests/test_checkpoint.py has states, and test_parallel.py steps, in less time")
def test_one_device_eight_and_one_again(tmp_path, text):
    fit(tmp_path / "unbroken", "llama", text, ahead=2)
    for name in ("one", "two"):
        fit(tmp_path / name, "llama", text, ahead=2, last=4)
        fit(tmp_path / name, "llama", text, ahead=2, last=4, n_devices=8, more=["--mesh.data", "8"])
        fit(tmp_path / name, "llama", text, ahead=2)
    assert sums_of(tmp_path / "one") == sums_of(tmp_path / "two")
    assert records(tmp_path / "one") == records(tmp_path / "two")
    losses = [
        [float.fromhex(row["loss"]) for row in records(tmp_path / name) if "loss" in row]
        for name in ("one", "unbroken")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
