"""A run's numbers go where they are asked to, and a disk without room costs some of them alone."""

import errno
import importlib
import time
import types
import warnings

import pytest

from tx_jax.errors import InputError
from tx_jax.run_config import RunConfig
from tx_jax.training import writers
from tx_jax.training.writers import Writer, careful, open_writer


@pytest.fixture
def cfg(tmp_path):
    def of(log_to):
        return RunConfig(run_dir=str(tmp_path / "run"), log_to=log_to)

    (tmp_path / "run").mkdir()
    return of


def shown(directory):
    """What TensorBoard reads there: (step, number) by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime):
        events = accumulator.EventAccumulator(str(path)).Reload()
        for name in events.Tags()["tensors"]:
            numbers = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(name)]
            found.setdefault(name, []).extend(numbers)
    return found


def test_tensorboard_reads_what_was_written(cfg, tmp_path):
    for steps in ((1, 2), (2, 3)):  # a run, and one that goes on
        writer = open_writer(cfg("tensorboard"))
        for step in steps:
            writer.add(step, {"loss": step / 2, "lr": 0.25})
        writer.close()
    found = shown(tmp_path / "run" / "tensorboard")
    assert found == {"loss": [(1, 0.5), (2, 1.0), (2, 1.0), (3, 1.5)], "lr": [(n, 0.25) for n in (1, 2, 2, 3)]}


def test_after_its_first_failure_a_writer_is_left_alone():
    said, took = [], []

    def add(step, numbers):
        took.append(step)
        raise OSError(errno.ENOSPC, "no space")

    writer = careful(Writer(add, lambda: took.append("closed")), said.append)
    writer.add(1, {})
    writer.add(2, {})
    writer.close()
    assert took == [1]
    assert said == ["WARNING: log_to takes no more numbers (OSError(28, 'no space')); metrics.jsonl has them all"]


def test_wandb_keeps_a_run_in_its_directory(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):  # and one that goes on
        writer = open_writer(cfg("wandb"))
        writer.add(7, {"loss_of_a_test": 1.0})
        writer.close()
        time.sleep(1)  # whose directory has another second in its name
    one, other = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert one.name == other.name  # of the run's id
    assert b"loss_of_a_test" in one.read_bytes()


@pytest.mark.parametrize("name", ["run-20261129_120000-my-run", "offline-run-20261129_120000-my-run"])
def test_wandb_goes_on_with_the_run_that_is_there(cfg, tmp_path, monkeypatch, name):
    given = {}
    run = types.SimpleNamespace(define_metric=lambda *_, **__: None, log=None, finish=None)
    monkeypatch.setattr(importlib.import_module("wandb"), "init", lambda **how: given.update(how) or run)
    (tmp_path / "run" / "wandb" / name).mkdir(parents=True)
    open_writer(cfg("wandb"))
    assert given["id"] == "my-run"


def test_wandb_without_a_key(cfg, monkeypatch):
    def init(**how):
        raise wandb.Error("No API key configured.\nUse wandb login")

    wandb = importlib.import_module("wandb")
    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(
        InputError, match=r"^log_to='wandb' cannot begin: No API key configured\.; run wandb login, set"
    ):
        open_writer(cfg("wandb"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_the_package(cfg, monkeypatch, name):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(writers.importlib, "import_module", missing)
    with pytest.raises(
        InputError, match=rf"log_to='{name}' needs a package that is not installed; pip install {name}, or give"
    ):
        open_writer(cfg(name))
