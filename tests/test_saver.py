"""What is saved stays whole: through kills at any moment, flipped bits, lost files and full disks."""

import contextlib
import errno
import logging
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import DATA, assert_same, make_state, put
from trials import FULL, trials

from tx_jax.checkpoint import CheckpointError, best_step, latest_step, restore, saved_steps
from tx_jax.errors import InputError
from tx_jax.saver import Saver

# Reads that tensorstore ends after the first has failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TESTS = pathlib.Path(__file__).parent
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
CLOCK = time.monotonic if FULL else time.process_time  # seconds of the processor: of no other test beside it


def test_keeps_the_newest(tmp_path):
    assert latest_step(tmp_path) is None
    left = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    assert latest_step(tmp_path) is None
    put(tmp_path, 2, 9, 10, keep=2)
    assert latest_step(tmp_path) == 10
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "9"]
    assert_same(restore(tmp_path, make_state(), step=9)[0], make_state(9))


def test_keeps_every_nth_and_the_best(tmp_path):
    losses = {1: math.nan, 2: 3.0, 3: 3.0, 4: 4.0, 5: math.nan, 6: 3.5, 7: None, 8: 9.0}

    def go_on(*steps):
        with Saver(tmp_path, 1, keep_every=4, keep_best=True) as save:
            for step in steps:
                save(step, make_state(step), {} if losses[step] is None else {"valid_loss": losses[step]})
            return save.best

    assert go_on(1) == math.inf
    assert go_on(2, 3, 4, 5) == 3.0
    assert saved_steps(tmp_path) == [2, 4, 5]
    assert best_step(tmp_path) == 2
    assert go_on(6, 7, 8) == 3.0  # which it has read
    assert saved_steps(tmp_path) == [2, 4, 8]
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert best_step(tmp_path) == 4


def test_no_best_without_a_loss(tmp_path):
    text = f"^run_dir='{re.escape(str(tmp_path))}' has no checkpoint of a step that was evaluated; train with --train"
    with pytest.raises(InputError, match=text):
        best_step(put(tmp_path, 1))


WRITER = """
import itertools, shutil, sys, time
from test_checkpoint import make_state
from tx_jax import saver
from tx_jax.checkpoint import latest_step
run_dir, how = sys.argv[1:]
remove = shutil.rmtree
def slowly(path, **_):
    print("-1", flush=True)
    for part in sorted(path.rglob("*"), reverse=True):
        part.rmdir() if part.is_dir() else part.unlink()
        time.sleep(0.004)
    remove(path)
if how == "removing":
    shutil.rmtree = slowly
with saver.Saver(run_dir, 2) as save:
    for step in itertools.count(1 + (latest_step(run_dir) or 0)):
        save(step, make_state(step), {"next_index": step})
        if how == "at once":
            save.failure(wait=True)
        print(step - (how != "at once"), flush=True)
"""


@pytest.mark.parametrize("how", ["behind", "at once", "removing"])
def test_a_kill_costs_no_step_that_was_saved(tmp_path, how):
    rng, done = random.Random(how), 0
    for trial in trials(1, 67):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, how], stdout=subprocess.PIPE, env=ENVIRONMENT
        )
        assert writer.stdout is not None
        told = [int(writer.stdout.readline())]
        while max(told) < done + 3 or (how == "removing" and told[-1] >= 0):
            told.append(int(writer.stdout.readline() or pytest.fail(f"trial {trial}: the writer did not start")))
        time.sleep(rng.uniform(0, 0.2 if how == "removing" else 0.1))  # within a write, a rename, a removal
        writer.send_signal(signal.SIGKILL)
        told += [int(row) for row in writer.communicate()[0].split()]
        steps = saved_steps(tmp_path)
        assert max(steps) >= max(told), f"trial {trial}"
        for step in steps:
            state, data = restore(tmp_path, make_state(), step)
            assert_same(state, make_state(step))
            assert data == {"next_index": step}
        done = max(steps)
    put(tmp_path, done + 1, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == [f"{done + 1}"]


def payload(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a checkpoint that are not empty, arrays first."""
    files = (file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    return sorted(files, key=lambda file: (-file.stat().st_size, file))


def big_state(rng: np.random.Generator) -> Any:
    return make_state(3)._replace(params={"w": jnp.asarray(rng.integers(0, 2**32, 4096, np.uint32)), "b": jnp.ones(9)})


def refusal(run_dir: pathlib.Path, state: Any) -> str | None:
    """Why a checkpoint is not restored, in one line and within five seconds. None: it is what was saved."""
    start = CLOCK()
    try:
        found, data = restore(run_dir, jax.eval_shape(lambda: state))
    except CheckpointError as error:
        said = str(error)
    else:
        assert_same(found, state)
        assert data == DATA
        return None
    assert CLOCK() < start + 5
    assert f"{run_dir}/checkpoints/3" in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("seed", trials(12, 200))
def test_a_flipped_bit_is_never_another_number(tmp_path, seed):
    """Or a block of zeros."""
    rng = np.random.default_rng(seed)
    state = big_state(rng)
    with Saver(tmp_path, 1) as save:
        save(3, state, DATA)
    victim = payload(tmp_path / "checkpoints" / "3")[0]
    content = bytearray(victim.read_bytes())
    at = int(rng.uniform(0.1, 0.8) * len(content))
    if seed % 2:
        content[at : at + 512] = bytes(512)
    else:
        content[at] ^= 1 << int(rng.integers(8))
    victim.write_bytes(content)
    assert "params/w of " in (refusal(tmp_path, state) or "")


HARM = {
    "lost": pathlib.Path.unlink,
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
}


@pytest.mark.parametrize("seed", trials(1, 2))
@pytest.mark.parametrize("harm", HARM)
def test_whichever_file_is_harmed(tmp_path, harm, seed):
    state = big_state(np.random.default_rng(seed))
    with Saver(tmp_path / "run", 1) as save:
        save(3, state, DATA)
    told = []
    for file in payload(tmp_path / "run" / "checkpoints" / "3"):
        again = tmp_path / "again"
        shutil.copytree(tmp_path / "run", again)
        HARM[harm](again / file.relative_to(tmp_path / "run"))
        told.append(refusal(again, state))
        shutil.rmtree(again)
    assert len(told) >= 12
    assert len(list(filter(None, told))) >= 7, told  # the others are what nobody reads, or can be done without


HARMED = """
import pathlib, sys
import numpy as np
from test_saver import HARM, big_state, payload, refusal
run_dir, state = pathlib.Path(sys.argv[1]), big_state(np.random.default_rng(0))
for file in payload(run_dir):
    content = file.read_bytes()
    HARM["cut"](file)
    refusal(run_dir, state)
    file.write_bytes(content)
assert refusal(run_dir, state) is None
"""


def test_a_harmed_file_is_told_of_in_one_line_alone(tmp_path):
    """And not by what other reads leave, some time later."""
    with Saver(tmp_path, 1) as save:
        save(3, big_state(np.random.default_rng(0)), DATA)
    reader = subprocess.run([sys.executable, "-c", HARMED, tmp_path], env=ENVIRONMENT, capture_output=True, text=True)
    assert (reader.returncode, reader.stderr) == (0, "")


@contextlib.contextmanager
def no_larger_files(size: int):
    """As on a full disk, writing fails after so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_one_save(tmp_path, capfd, caplog):
    state = big_state(np.random.default_rng(0))
    with Saver(tmp_path, 2) as save:
        save(1, state, DATA)
        assert save.failure(wait=True) is None
        with no_larger_files(4096):
            save(2, state, DATA)
            deadline = time.monotonic() + 60
            while (why := save.failure()) is None and time.monotonic() < deadline:
                time.sleep(0.01)
        assert why == f"step 2 is not saved in run_dir='{tmp_path}': File too large"
        assert saved_steps(tmp_path) == [1]
        assert save.failure() is None  # it is told once
        save(3, state, DATA)  # which also removes what other threads of that save may have written since
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "3"]
    assert refusal(tmp_path, state) is None
    assert capfd.readouterr().err == ""
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_what_other_writes_say_later_is_not_heard(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "excepthook", lambda *said: heard.append(str(said[1])))
    with Saver(tmp_path, 1):
        for text in ("Event loop is closed", "of ours"):  # the first as a thread of tensorstore says it
            sys.excepthook(RuntimeError, RuntimeError(text), None)
    sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
    assert heard == ["of ours", "Event loop is closed"]


def test_a_disk_that_stays_full(tmp_path, capfd):
    """Of many arrays some are still being written when the first has failed."""
    rng = np.random.default_rng(0)
    state = make_state(1)._replace(
        params={f"{i}": jnp.asarray(rng.normal(size=(64, 64)), "float32") for i in range(90)}
    )
    with Saver(tmp_path, 1) as save, no_larger_files(100_000):
        for step in trials(6, 200):
            save(step, state, DATA)
            assert str(save.failure(wait=True)).endswith("File too large")
    with Saver(tmp_path, 1) as save:
        save(999, state, DATA)
    assert os.listdir(tmp_path / "checkpoints") == ["999"]
    assert capfd.readouterr().err == ""


def test_what_nobody_asks_about_is_raised(tmp_path):
    state, save = big_state(np.random.default_rng(0)), Saver(tmp_path, 2)
    text = r"^step 2 is not saved in run_dir=.*: File too large, and none before it is; mend it, and run .* again$"
    with no_larger_files(4096):
        save(2, state, DATA)
        with pytest.raises(CheckpointError, match=text):
            save(3, state, DATA)
        with pytest.raises(CheckpointError, match=text), save:
            save(2, state, DATA)
    assert saved_steps(tmp_path) == []


def test_room_is_looked_for_before_a_save(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    with Saver(tmp_path, 2) as save:
        save(1, make_state(1)._replace(params={"w": jnp.ones(125_000)}), DATA)
        assert os.listdir(tmp_path / "checkpoints") == []
        why = save.failure()
    assert why == f"step 1 is not saved in run_dir='{tmp_path}': it needs 0.50 MB, and its disk has 0.30 left"


def test_a_disk_that_fails_costs_saves_alone(tmp_path, monkeypatch):
    def failing(error):
        def fail(*_):
            raise OSError(error, os.strerror(error))

        return fail

    with Saver(tmp_path, 1) as save:
        save(1, make_state(1), DATA)
        assert save.failure(wait=True) is None
        monkeypatch.setattr(shutil, "disk_usage", failing(errno.EIO))
        save(2, make_state(2), DATA)
        assert save.failure() == f"step 2 is not saved in run_dir='{tmp_path}': Input/output error"
        monkeypatch.undo()
        monkeypatch.setattr(os, "mkdir", failing(errno.EROFS))
        save(2, make_state(2), DATA)
        assert save.failure() == f"step 2 is not saved in run_dir='{tmp_path}': Read-only file system"
        monkeypatch.undo()
        monkeypatch.setattr(pathlib.PosixPath, "rename", failing(errno.EROFS))  # of what is to be removed
        save(3, make_state(3), DATA)
        assert save.failure(wait=True) is None
        assert saved_steps(tmp_path) == [1, 3]
        monkeypatch.undo()
    with Saver(tmp_path, 1):
        assert saved_steps(tmp_path) == [3]


def test_a_best_that_is_not_saved_leaves_the_best_that_is(tmp_path):
    with Saver(tmp_path, 1, keep_best=True) as save:
        for step, loss in ((1, 3.0), (2, 3.5)):
            save(step, make_state(step), DATA | {"valid_loss": loss})
        assert save.failure(wait=True) is None
        with no_larger_files(100):
            save(3, make_state(3), DATA | {"valid_loss": 2.9})
            assert save.failure(wait=True) == f"step 3 is not saved in run_dir='{tmp_path}': File too large"
        assert (saved_steps(tmp_path), save.best) == ([1, 2], 3.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved(tmp_path, bad):
    state = make_state(1)
    with Saver(tmp_path, 2) as save:
        save(1, state._replace(opt_state=jnp.array([1, bad])), DATA)
        assert save.failure() == f"step 1 is not saved in run_dir='{tmp_path}': state/opt_state is not finite"
        state.params["b"]["c"] = state.params["b"]["c"].at[3].set(bad)
        save(1, state, DATA)
        assert save.failure() == f"step 1 is not saved in run_dir='{tmp_path}': params/b/c is not finite"
    assert saved_steps(tmp_path) == []
