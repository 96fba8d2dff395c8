"""A run's numbers go where they are asked to, and a disk without room costs some of them alone."""

import errno
import importlib
import warnings

import pytest

from tx_jax.errors import InputError
from tx_jax.run_config import RunConfig
from tx_jax.training import writers
from tx_jax.training.writers import open_writer


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


def test_after_a_full_disk_numbers_go_to_another_file(cfg, tmp_path, monkeypatch):
    writer = open_writer(cfg("tensorboard"))
    writer.add(1, {"loss": 1.0})
    library = importlib.import_module("tensorboard.summary")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(library.Writer, "flush", full)
        with pytest.raises(OSError, match="no space"):
            writer.add(2, {"loss": 2.0})
    writer.add(3, {"loss": 3.0})
    writer.close()
    assert shown(tmp_path / "run" / "tensorboard")["loss"][-1] == (3, 3.0)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2


def test_wandb_keeps_a_run_in_its_directory(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = open_writer(cfg("wandb"))
    writer.add(7, {"loss_of_a_test": 1.0})
    writer.close()
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss_of_a_test" in kept.read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_the_package(cfg, monkeypatch, name):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(writers.importlib, "import_module", missing)
    with pytest.raises(InputError, match=rf"log_to='{name}' needs a package that is not installed; pip install {name}"):
        open_writer(cfg(name))
