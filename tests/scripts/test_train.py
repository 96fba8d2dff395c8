"""What train.py leaves behind, and how a run goes on."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest

from tx_jax.checkpoint import latest_step, restore_params
from tx_jax.models import build, init_params
from tx_jax.run_dir import read_config

SPEEDS = {"tokens_per_second", "mfu", "data_wait", "memory_bytes"}


def records(run_dir):
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in rows]


def assert_same_params(a, b):
    shapes = jax.eval_shape(lambda key: init_params(build(read_config(a).model), key), jax.random.key(0))
    found = [jax.tree.leaves(restore_params(run_dir, shapes)) for run_dir in (a, b)]
    for one, other in zip(*found, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_run_leaves_everything(run, text):
    config = read_config(run)
    assert config.model.vocab_size == len(set(text.read_text()))
    assert (config.model.n_layers, config.train.n_steps, config.data.path) == (1, 40, str(text))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20", "40"]
    assert json.loads((run / "tokenizer" / "tokenizer.json").read_text())["kind"] == "char"
    assert (run / "samples.txt").read_text().startswith("=== step 40\n")
    assert (run / "plots" / "loss.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    losses = [row for row in records(run) if "loss" in row]
    assert [row["step"] for row in losses] == [1, *range(5, 41, 5)]
    assert all(row.keys() == {"step", "loss", "lr", "grad_norm"} for row in losses)
    valid = [row for row in records(run) if "valid_loss" in row]
    assert [row["step"] for row in valid] == [20, 40]
    for row in valid:
        assert row["bits_per_byte"] == pytest.approx(row["valid_loss"] / np.log(2), rel=1e-6)  # a character is a byte
    assert valid[-1]["valid_loss"] < losses[0]["loss"] - 0.3


def test_every_record_but_the_first_tells_how_fast(run):
    first, *rest = (json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in row)
    assert not SPEEDS & first.keys()
    for row in rest:
        assert row["tokens_per_second"] > 0
        assert 0 < row["mfu"] < 1
        assert 0 <= row["data_wait"] < 1
        assert row["memory_bytes"] > 2**26


def test_a_profile_of_stacked_layers_which_a_run_may_leave_again(run, train, tiny, tmp_path, capsys):
    """A checkpoint does not tell how its layers were computed."""
    again = tmp_path / "again"
    layers = ["--train.scan-layers", "--train.remat", "full", "--train.accumulate-steps", "2", "--mesh.tensor", "2"]
    train([*tiny, *layers, "--profile", "--run-dir", str(again)])
    assert f"the trace of 5 steps is in {again}/profile" in capsys.readouterr().out
    assert list((again / "profile").rglob("*.xplane.pb"))
    shutil.rmtree(again / "checkpoints" / "40")
    train([*tiny, "--run-dir", str(again)])
    assert "continuing after step 20 of 40" in capsys.readouterr().out
    for one, other in zip(
        *([row for row in records(path) if "valid_loss" in row] for path in (again, run)), strict=True
    ):
        assert one["valid_loss"] == pytest.approx(other["valid_loss"], abs=0.2)  # another draw of dropout


def test_running_again_when_done_changes_nothing(run, train, capsys):
    before = records(run)
    train([str(run / "config.json")])
    out = capsys.readouterr().out
    assert "continuing after step 40 of 40" in out
    assert f"done. To sample: python sample.py {run}" in out
    assert records(run) == before


def test_going_on_after_a_kill_is_bit_exact(run, train, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "40")  # killed after the save at 20
    train([str(run / "config.json"), "--run-dir", str(again)])
    assert "continuing after step 20 of 40" in capsys.readouterr().out
    assert_same_params(run, again)
    assert [row for row in records(again) if row["step"] != 21] == records(run)  # 21: its first, which it reports


def test_a_text_without_line_ends(train, sample, tiny, tmp_path, capsys):
    path, run = tmp_path / "text.txt", str(tmp_path / "run")
    path.write_text("abcab" * 200)
    command = [*tiny, "--data.path", str(path), "--run-dir", run, "--train.n-steps", "2"]
    train(command)
    sample([run, "--max-new-tokens", "4"])
    assert set(capsys.readouterr().out.splitlines()[-1]) <= set("abc")
    path.write_text("cabca" * 200)
    with pytest.raises(SystemExit, match="2"):
        train(command)
    assert "began with a text of SHA-256" in capsys.readouterr().err


def test_0_is_never(train, tiny, tmp_path):
    never = [f"--train.{name}-every=0" for name in ("log", "eval", "sample", "save")]
    train([*tiny, *never, "--run-dir", str(tmp_path / "run")])
    assert [row["step"] for row in records(tmp_path / "run")] == [1, 40]
    assert not (tmp_path / "run" / "samples.txt").exists()
    assert latest_step(tmp_path / "run") == 40  # the last step is always saved
