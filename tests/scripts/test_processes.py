"""Many processes, here on one machine, are one run: its numbers, its files, its errors."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import records

from tx_jax import InputError
from tx_jax.checkpoint import saved_steps
from tx_jax.processes import connect

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "tests" / "training"
SHORT = """--model.dropout-rate 0 --model.window None --train.n-steps 4 --train.log-every 1 --train.eval-every 4
    --train.save-every 2 --train.sample-every 4""".split()  # noqa: SIM905
UPDATES = """
import sys
import jax, numpy as np
from tx_jax.processes import connect, gathered, is_first
connect(sys.argv[3:])
from test_parallel import MODELS, updated
for model in MODELS:
    _, state, metrics = updated(model, sys.argv[2])
    leaves = [metrics, *jax.tree.leaves(gathered(state.params))]
    if is_first():
        np.savez(f"{sys.argv[1]}/{model}.npz", *leaves)
"""


def start(n, n_devices, *args, each=lambda i: ()):
    """What n processes said, once they have ended well or badly."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={n_devices}"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TRAINING)]),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    flags = ("--coordinator", address, "--n-processes", str(n), "--process-id")
    started = [
        subprocess.Popen([sys.executable, *args, *flags, str(i), *each(i)], env=env, cwd=ROOT, **pipes)
        for i in range(n)
    ]
    try:
        return [(process.communicate(timeout=300)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(TRAINING)


@pytest.mark.parametrize(("n", "mesh"), [(2, "fsdp 8"), (4, "data 2 × tensor 4")])
def test_processes_of_eight_devices_in_all_give_the_update_of_one_device(n, mesh, tmp_path, training):
    from test_parallel import MODELS, updated

    for said, code in start(n, 8 // n, "-c", UPDATES, str(tmp_path), mesh):
        assert code == 0, said
    for model in MODELS:
        _, expected, metrics = updated(model)
        with np.load(tmp_path / f"{model}.npz") as found:
            for name, leaf in zip(found, [metrics, *jax.tree.leaves(expected.params)], strict=True):
                np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=2e-6)


def test_a_run_of_two_processes_goes_on_in_one_on_another_mesh(train, tiny, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    train([*tiny, *SHORT, "--mesh.fsdp", "8", "--run-dir", str(one)])
    shown = ["--log-to", "tensorboard"]
    ends = start(2, 4, "train.py", *tiny, *SHORT, "--mesh.fsdp", "8", "--run-dir", str(two), *shown)
    assert len([*(two / "tensorboard").iterdir()]) == 1
    assert [code for _, code in ends] == [0, 0], ends
    assert "on 8 × cpu" in ends[0][0]
    assert "step" not in ends[1][0]  # the first speaks for both
    for row, expected in zip(records(two), records(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert (two / "samples.txt").read_text() == (one / "samples.txt").read_text()
    shutil.rmtree(two / "checkpoints" / "4")
    capsys.readouterr()
    train([*tiny, *SHORT, "--mesh.tensor", "2", "--mesh.sequence", "2", "--run-dir", str(two)])
    assert "continuing after step 2 of 4" in capsys.readouterr().out
    for row, expected in zip(records(two), records(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_two_processes_plan_together(tiny, tmp_path):
    ends = start(2, 1, "train.py", *tiny, "--mesh.fsdp", "2", "--run-dir", str(tmp_path / "run"), "--dry-run")
    assert [code for _, code in ends] == [0, 0], ends
    assert "on 2 × cpu: " in ends[0][0]
    assert "parameters" not in ends[1][0]  # the first speaks for both
    assert not (tmp_path / "run").exists()


NO_ROOM = """
import shutil, sys
from train import main
usage, asked = shutil.disk_usage, []
if sys.argv[-1] == "1":  # of the second process, at its first save
    shutil.disk_usage = lambda path: usage(path)._replace(free=0 if not asked and not asked.append(path) else 10**9)
main(sys.argv[1:])
"""


def test_what_one_process_cannot_save_none_does_and_the_run_goes_on(tiny, tmp_path):
    run_dir = tmp_path / "run"
    ends = start(2, 1, "-c", NO_ROOM, *tiny, *SHORT, "--train.keep-best", "--mesh.fsdp", "2", "--run-dir", str(run_dir))
    assert [code for _, code in ends] == [0, 0], ends
    why = f"step 2 is not saved in run_dir='{run_dir}': it needs 0.04 MB, and its disk has 0.00 left"
    assert f"WARNING: {why}. The run goes on, and tries again" in ends[0][0]
    assert [row for row in records(run_dir) if "unsaved" in row] == [{"step": 3, "unsaved": why}]  # the next report
    assert saved_steps(run_dir) == [3, 4]


NO_FILE = """
import resource, sys, time
from train import main
from tx_jax import saver
saver.TIMEOUT = 5
if sys.argv[-1] == sys.argv.pop(1):
    call = saver.Saver.__call__
    def cannot_write(self, step, state, data):  # at its first save
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if step == 2 else -1, -1))
        call(self, step, state, data)
        while step == 2 and not self.pending.done():
            time.sleep(0.1)
    saver.Saver.__call__ = cannot_write
main(sys.argv[1:])
"""


@pytest.mark.parametrize("who", ["0", "1"])
def test_what_one_process_fails_to_write_is_told_and_the_run_waits_for_none(tiny, tmp_path, who):
    run_dir = tmp_path / "run"
    ends = start(2, 1, "-c", NO_FILE, who, *tiny, *SHORT, "--mesh.fsdp", "2", "--run-dir", str(run_dir))
    assert [code for _, code in ends] == [0, 0], ends
    why = f"step 2 is not saved in run_dir='{run_dir}': File too large"
    assert [row for row in records(run_dir) if "unsaved" in row] == [{"step": 3, "unsaved": why}]
    assert saved_steps(run_dir) == [4]  # at 3 the other still waited


def test_a_signal_ends_a_process_that_has_found_the_others():
    connected = "import os, signal, sys, time; from tx_jax.processes import connect; connect(sys.argv[1:])"
    ends = start(1, 1, "-c", f"{connected}; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)")
    assert ends[0][1] == -signal.SIGTERM


def test_processes_of_other_flags_end_and_say_why(tiny, tmp_path):
    rates = {0: "1e-2", 1: "1e-3"}
    first, second = start(
        2,
        1,
        "train.py",
        *tiny,
        *SHORT,
        "--run-dir",
        str(tmp_path / "run"),
        each=lambda i: ("--optim.peak-lr", rates[i]),
    )
    assert "error: another process has other flags, and says which; start all with the same" in first[0]
    assert "error: process 1 has optim.peak_lr=0.001, not 0.01, as process 0 has; start all with the same" in second[0]
    assert (first[1], second[1]) == (2, 2)
    assert not (tmp_path / "run").exists()


def test_what_the_first_refuses_ends_all(tiny, tmp_path):
    (tmp_path / "other").write_text("not a run")
    first, second = start(2, 1, "train.py", *tiny, *SHORT, "--run-dir", str(tmp_path))
    assert f"error: run_dir='{tmp_path}' holds files but no config.json; use another --run-dir" in first[0]
    assert "error: process 0 refuses to start, and says why; see there" in second[0]
    assert (first[1], second[1]) == (2, 2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--n-processes 2", r"^--n-processes and --process-id need --coordinator HOST:PORT; or leave them out$"),
        (
            "--coordinator localhost:1 --n-processes 2",
            r"^--coordinator localhost:1 needs --n-processes N and --process-id I, from 0 to N - 1, not 2 and None",
        ),
        (
            "--coordinator localhost:1 --n-processes 2 --process-id 2",
            r"^--coordinator .* not 2 and 2;",
        ),
        ("--coordinator auto", r"^--coordinator auto finds no other processes: .*; give HOST:PORT$"),
    ],
)
def test_processes_that_cannot_find_each_other(flags, says):
    with pytest.raises(InputError, match=says):
        connect(flags.split())


def test_one_process_needs_no_flags():
    assert connect(["--optim.peak-lr", "1"]) == ["--optim.peak-lr", "1"]
