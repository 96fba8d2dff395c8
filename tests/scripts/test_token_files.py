"""train.py on token files: packed, mixed, by several processes, resumed, and refused when they change."""

import json
import shutil

import numpy as np
import pytest
from test_processes import start
from test_train import assert_same_params, records

from tx_jax.data.token_files import begin_token_files, write_token_files
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from tx_jax.run_dir import read_config
from tx_jax.training.tasks import open_task

FLAGS = """gpt-shakespeare --model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.max-len 32 --data.seq-len 32
    --model.dropout-rate 0 --data.batch-size 8 --optim.warmup-steps 2 --train.n-steps 6 --train.log-every 1
    --train.eval-every 3 --train.save-every 3 --train.sample-every 6 --train.sample-tokens 9""".split()  # noqa: SIM905


def make(home, seed, n=60):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 90, n)
    documents = [(rng.integers(97, 97 + 9 * (seed + 1), length), int(length) - 1) for length in lengths]
    index = begin_token_files(home, {"seed": seed})
    write_token_files(home, index, lambda first: documents[first:], 256, 1000)
    ByteTokenizer().save(home / "tokenizer")
    return home


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make(tmp_path_factory.mktemp("files") / "a", 0)


@pytest.fixture(scope="module")
def run(files, train, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train([*FLAGS, "--data.path", str(files), "--run-dir", str(run_dir)])
    return run_dir


def test_a_run_on_token_files_goes_on_to_the_same_bits(run, files, train, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "6")
    train([*FLAGS, "--data.path", str(files), "--run-dir", str(again)])
    assert_same_params(run, again)
    assert records(run) == records(again)


def test_bits_per_byte_are_those_of_the_loss_over_all_bytes_held_out(run):
    task = open_task(read_config(run))
    n_targets = sum(float(task.held_out[i].weights.sum()) for i in range(len(task.held_out)))
    for row in records(run):
        if "valid_loss" in row:
            assert row["bits_per_byte"] == pytest.approx(row["valid_loss"] * n_targets / np.log(2) / task.n_bytes)
            assert task.n_bytes == n_targets  # each is a byte


def test_two_processes_that_read_a_half_each_train_as_one(run, files, tmp_path):
    flags = [*FLAGS, "--data.path", str(files), "--mesh.fsdp", "8", "--run-dir", str(tmp_path / "two")]
    ends = start(2, 4, "train.py", *flags)
    assert [code for _, code in ends] == [0, 0], ends
    for row, expected in zip(records(tmp_path / "two"), records(run), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_mixture_is_read_and_resumed(files, train, tmp_path):
    flags = [*FLAGS, "--data.mixture", f"{files}=3,{make(tmp_path / 'b', 1)}=1", "--run-dir", str(tmp_path / "run")]
    train(flags)
    before = records(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    train(flags)
    assert records(tmp_path / "run") == before


def refused(train, capsys, *flags):
    """What train.py says as it ends."""
    with pytest.raises(SystemExit, match="2"):
        train([*FLAGS, *flags])
    return capsys.readouterr().err.strip()


def test_a_file_that_changed_since_the_run_began_is_refused(run, files, train, tmp_path, capsys):
    copy, mine = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(files, copy)
    shutil.copytree(run, mine)
    path = copy / "00000.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    says = refused(train, capsys, "--data.path", str(copy), "--run-dir", str(mine))
    assert "00000.tokens has " in says
    assert "it was cut; run python -m tx_jax.data.prepare again, which mends it, or bring" in says
    shutil.rmtree(copy)  # whole again, but of other documents
    config = json.loads((mine / "config.json").read_text())
    config["data"]["path"] = str(make(copy, 5))
    (mine / "config.json").write_text(json.dumps(config))
    says = refused(train, capsys, "--data.path", str(copy), "--run-dir", str(mine))
    assert "began with a text of SHA-256" in says


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data.mixture A=1,B", "mixture='A=1,B' has 'B', which is not DIRECTORY=SHARE; write wiki=3,code=1"),
        ("--data.mixture A=0", "mixture='A=0' has 'A=0', which is not DIRECTORY=SHARE"),
        ("--data.mixture A=1 --data.path A", "mixture='A=1' and path='A' are two texts; give one"),
        (
            "--data.path A --data.objective prefix_lm",
            "token files are for data.objective='next_token', not",
        ),
        ("--data.mixture A=1,C=1", "C does not hold the tokenizer of its 256 ids; prepare it again"),
        ("--data.mixture A=1,D=1", "D has another tokenizer than A; prepare it with that one"),
        ("--data.mixture A=1 --data.objective prefix_lm", "mixture='A=1' is for objective='next_token', not 'prefix"),
        ("--data.path A --data.tokenizer byte", "--data.tokenizer cannot be chosen with the token files of A, which"),
        ("--data.path E", "E has 0 pieces of text to train on, and 2 held out; give more documents, or another"),
        ("--data.path lines.jsonl", "path='lines.jsonl' holds a text in each line of JSON; make token files of it by"),
        ("--data.path A --init TINY", "init='TINY' has another tokenizer than A; prepare it with --tokenizer TINY"),
    ],
)
def test_what_is_refused(flags, says, files, public, train, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files, "A")
    shutil.copytree(files, "C", ignore=lambda *_: ["tokenizer"])
    shutil.copytree(public, "TINY")
    shutil.copytree(files, "D", ignore=lambda *_: ["tokenizer"])
    CharTokenizer("".join(map(chr, range(256)))).save("D/tokenizer")
    parts = [(np.full(n, 97), n) for n in (1, 50)]
    write_token_files(tmp_path / "E", begin_token_files(tmp_path / "E", {}), lambda first: parts[first:], 256)
    shutil.copytree("A/tokenizer", "E/tokenizer")
    (tmp_path / "lines.jsonl").write_text("{}")
    preset = ["finetune", "--data.seq-len", "32"] if "--init" in flags else FLAGS
    with pytest.raises(SystemExit, match="2"):
        train([*preset, *flags.split(), "--run-dir", "run"])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
