"""A run of this release, kept as it was written: every version that is supported reads it, and goes on with it.

`python tests/test_golden.py` makes one anew, for the next release, beside which this one stays.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.command_line import parse_run
from tx_jax.integrity import sums
from tx_jax.training import loop

GOLDEN = Path(__file__).with_name("golden") / "0.1"
FLAGS = """--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.max-len 64 --model.window 16
    --model.dropout-rate 0.3 --data.path text.txt --data.seq-len 16 --data.batch-size 8 --optim.peak-lr 1e-2
    --optim.warmup-steps 2 --train.n-steps 12 --train.log-every 1 --train.save-every 4 --train.eval-every 4
    --train.sample-every 0 --mesh.data 1 --run-dir run"""
LAST = 8  # where it was stopped


def told(found, tokenizer):
    """What is known of it: the bits of its parameters, and what they make of a text."""
    ids = tokenizer.encode("the cat sat on a mat")[None]
    log_probs = tx.score(tx.build(found.cfg), found.params, ids)
    return {"sums": sums(found.params), "log_probs": [round(float(x), 5) for x in log_probs[0]]}


def test_it_is_read():
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    known = json.loads((GOLDEN / "known.json").read_text())
    now = told(tx.load_pretrained(GOLDEN / "run"), tx.load_tokenizer(GOLDEN / "run"))
    assert now["sums"] == known["sums"]
    np.testing.assert_allclose(now["log_probs"], known["log_probs"], atol=1e-4)


def test_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda *_, devices=tuple(jax.devices()[:1]): list(devices))
    shutil.copytree(GOLDEN, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    state = loop.fit(parse_run(["run/config.json"]))
    assert f"continuing after step {LAST} of 12" in capsys.readouterr().out
    assert state.step == 12
    rows = [json.loads(row) for row in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    known = json.loads((GOLDEN / "known.json").read_text())["losses"]
    assert len(losses) == 12
    assert losses == pytest.approx(known, rel=1e-3)


def make(home: Path) -> None:
    rng = np.random.default_rng(0)
    home.mkdir(parents=True)
    os.chdir(home)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "slept.", ""]
    Path("text.txt").write_text(" ".join(rng.choice(words, 400)) + "\n")
    args, asked = ["gpt-shakespeare", *FLAGS.split()], iter(range(100))
    loop.asked = lambda stop: next(asked) == LAST
    loop.fit(parse_run(args))
    known = told(tx.load_pretrained("run"), tx.load_tokenizer("run"))
    shutil.copytree("run", "whole")
    loop.asked = lambda stop: False
    loop.fit(parse_run([*args, "--run-dir", "whole"]))
    rows = [json.loads(row) for row in Path("whole/metrics.jsonl").read_text().splitlines()]
    losses = {"losses": [row["loss"] for row in rows if "loss" in row]}
    Path("known.json").write_text(json.dumps(known | losses, indent=1) + "\n")
    shutil.rmtree("whole")
    shutil.rmtree("run/plots", ignore_errors=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
