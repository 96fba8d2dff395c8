"""A run goes on bit for bit after signals, kills and damage, and only one process at a time writes to it."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_jax import load_pretrained, load_tokenizer
from tx_jax.checkpoint import latest_step, saved_data, saved_steps
from tx_jax.errors import InputError
from tx_jax.run_config import DataConfig, RunConfig
from tx_jax.run_dir import fields_of, locked
from tx_jax.training import loop
from tx_jax.training.report import Report
from tx_jax.training.resume import _check_same as check_same
from tx_jax.training.stopping import HEARD, Stop

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(run, train, child, tiny, tmp_path, capsys, number):
    stopped = tmp_path / "stopped"
    command = [*tiny, "--run-dir", str(stopped)]
    process = child("train.py", *command, "--train.log-every", "1", "--train.sample-every", "1")  # to be in time
    metrics, deadline = stopped / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (128 + number, HEARD.decode())
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
    assert warning.endswith("its bits are not those saved; the run goes on after step 20 if that is whole")
    assert aside == f"step 40 is set aside as {again}/checkpoints/40.aside"
    assert "continuing after step 20 of 40" in out
    assert_same_params(run, again)
    assert (again / "checkpoints" / "40.aside").is_dir()


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(train, again, capsys):
    damage(again, 20)
    config = again / "config.json"
    assert "checkpoints/20" in refused(train, capsys, config, "--run-dir", again, "--resume", "20")
    damage(again, 40)
    text = refused(train, capsys, config, "--run-dir", again)
    assert text.endswith(
        "checkpoints/20 is damaged: its bits are not those saved; no earlier one is whole; "
        "use another --run-dir to begin anew\n"
    )
    assert saved_steps(again) == [20, 40]


def test_a_log_without_checkpoints_begins_anew_and_says_so(run, train, again, capsys):
    shutil.rmtree(again / "checkpoints")
    train([str(again / "config.json"), "--run-dir", str(again)])
    assert capsys.readouterr().err == (f"WARNING: run_dir='{again}' has a log but no checkpoint: the run begins anew\n")
    assert_same_params(run, again)


def test_from_a_step_later_ones_are_set_aside(run, train, again, capsys):
    config = str(again / "config.json")
    samples = (again / "samples.txt").read_text()
    assert samples.count("=== step") == 1
    train([config, "--run-dir", str(again), "--resume", "20"])
    out, err = capsys.readouterr()
    assert err == f"step 40 is set aside as {again}/checkpoints/40.aside\n"
    assert "continuing after step 20 of 40" in out
    assert_same_params(run, again)
    assert (again / "samples.txt").read_text() == samples  # and not twice
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


MISMATCHES = {  # flag: what the run was begun with, and what it is now
    "--model.n-layers 2": "model.n_layers=1, not 2",
    "--model.d-model 32": "model.d_model=16, not 32",
    "--model.n-heads 4": "model.n_heads=2, not 4",
    "--model.max-len 128": "model.max_len=64, not 128",
    "--model.window 8": "model.window=16, not 8",
    "--model.mlp swiglu": "model.mlp='gelu', not 'swiglu'",
    "--model.norm rmsnorm": "model.norm='layernorm', not 'rmsnorm'",
    "--model.positions learned": "model.positions='rotary', not 'learned'",
    "--model.dtype bfloat16": "model.dtype='float32', not 'bfloat16'",
    "--model.dropout-rate 0.1": "model.dropout_rate=0.3, not 0.1; use another --run-dir, or its values, or --change",
    "--data.seq-len 8": "data.seq_len=16, not 8; use another --run-dir, or its values, or --change data.seq-len",
    "--data.batch-size 16": "data.batch_size=8, not 16; use another",
    "--data.valid-fraction 0.2": "data.valid_fraction=0.1, not 0.2; use another",
    "--data.tokenizer byte": "holds a run with another tokenizer, such as that of another text: of SHA-256 ",
    "--data.path {other}": "holds a run with another tokenizer, such as that of another text: of SHA-256 ",
    "--data.path {same_letters}": "…, and that of data.path='{same_letters}' has ",
    "--optim.peak-lr 0.1": "optim.peak_lr=0.01, not 0.1; use another --run-dir, or its values, or --change optim.peak",
    "--optim.name lion": "optim.name='adamw', not 'lion'",
    "--optim.beta2 0.9": "optim.beta2=0.99, not 0.9",
    "--optim.moment-dtype bfloat16": "optim.moment_dtype='float32', not 'bfloat16'",
    "--optim.schedule constant": "optim.schedule='cosine', not 'constant'",
    "--optim.clip-norm 2": "optim.clip_norm=1.0, not 2.0",
    "--train.n-steps 50": "train.n_steps=40, not 50",
    "--train.seed 1": "train.seed=0, not 1",
    "--train.ema-rate 0.9": "train.ema_rate=0.0, not 0.9",
    "--train.ema-rate 0.9 --change train.ema-rate": "error: ema/embed/table is absent in ",
    "--optim.moment-dtype bfloat16 --change optim.moment-dtype": "mu/embed/table is float32[15, 16] in ",
    "--train.n-steps 30 --change train.n-steps": "train.n_steps=30 is before step 40, up to which run_dir='",
    "--train.n-steps 30 --change train.n-steps --resume 40": "train.n_steps=30 is before step 40, up to which run_dir",
    "--model.n-heads 4 --change model.n-heads": "change='model.n-heads' names model.n_heads, which is no field that",
    "--change optim.peak": "change='optim.peak' names optim.peak, which is no field; did you mean optim.peak_lr?",
}  # fmt: skip


@pytest.fixture(scope="module")
def others(tmp_path_factory, text):
    """Texts of other letters, of the same and of fewer."""
    home = tmp_path_factory.mktemp("others")
    (home / "other.txt").write_text(text.read_text() + "Ω")
    (home / "same.txt").write_text(text.read_text()[::-1])
    (home / "fewer.txt").write_text(text.read_text().replace("t", ""))
    return {"other": home / "other.txt", "same_letters": home / "same.txt", "fewer_letters": home / "fewer.txt"}


def contents(home):
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("flags", MISMATCHES)
def test_another_run_is_refused(run, train, tiny, others, capsys, flags):
    flags, says, before = flags.format(**others), MISMATCHES[flags].format(**others), contents(run)
    assert says in refused(train, capsys, *tiny, "--run-dir", run, *flags.split())
    assert contents(run) == before


def records(run_dir):
    return [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_what_may_change_on_purpose(run, train, tiny, again, others, capsys):
    more = ["--optim.schedule", "constant", "--train.n-steps", "60", "--change", "optim.schedule,train.n-steps"]
    train([*tiny, "--run-dir", str(again), *more])
    out, err = capsys.readouterr()
    assert err == (
        "optim.schedule is 'constant' from here on, and was 'cosine'\ntrain.n_steps is 60 from here on, and was 40\n"
    )
    assert "continuing after step 40 of 60" in out
    assert latest_step(again) == 60
    assert records(again)[-2]["lr"] == pytest.approx(0.01)
    told = refused(train, capsys, *tiny, "--run-dir", again)
    assert "train.n_steps=60, not 40" in told
    train([str(again / "config.json"), "--run-dir", str(again)])  # its config says so from now on
    assert "continuing after step 60 of 60" in capsys.readouterr().out


def test_a_text_that_has_moved_is_the_same(text, train, tiny, again, tmp_path, capsys):
    moved = shutil.copy(text, tmp_path / "moved.txt")
    train([*tiny, "--run-dir", str(again), "--data.path", str(moved)])
    out, err = capsys.readouterr()
    assert err == f"data.path is {str(moved)!r} from here on, and was {str(text)!r}\n"
    assert "continuing after step 40 of 40" in out


def test_the_best_checkpoint_stays(train, sample, tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    worse = "--optim.peak-lr 10 --optim.warmup-steps 40"  # from step to step
    more = "--train.eval-every 2 --train.save-every 0 --train.keep 1 --train.keep-best"
    train([*tiny, *worse.split(), *more.split(), "--run-dir", str(run_dir)])
    losses = {row["step"]: row["valid_loss"] for row in records(run_dir) if "valid_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert best < 40
    assert saved_steps(run_dir) == [best, 40]
    assert saved_data(run_dir, best)["valid_loss"] == losses[best]
    capsys.readouterr()
    sample([str(run_dir), "--step", "best", "--max-new-tokens", "3"])
    text = capsys.readouterr().out
    sample([str(run_dir), "--step", str(best), "--max-new-tokens", "3"])
    assert capsys.readouterr().out == text


def test_other_data_begin_anew(run, train, tiny, again, others, capsys):
    to = ["--train.n-steps", "42", "--data.path", str(others["fewer_letters"]), "--run-dir", str(again)]
    train([*tiny, *to, "--train.log-every", "1", "--change", "data.path,train.n-steps"])
    *_, text, anew = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"the text is that of SHA-256 \w{8}… from here on, and was that of \w{8}…", text)
    assert anew == "the data begin at their first batch"
    fresh = again.parent / "fresh"
    train([*tiny, *to, "--run-dir", str(fresh), "--train.n-steps", "2", "--train.save-every", "1"])
    one, two = (saved_data(path)["batches"] for path in (again, fresh))
    assert one == two
    words = load_tokenizer(again)
    assert words == load_tokenizer(run)
    train([*tiny, *to])  # what was asked for once is so
    assert "continuing after step 42 of 42" in capsys.readouterr().out
    with others["fewer_letters"].open("a") as file:  # but not for another text
        file.write("a")
    assert "began with a text of SHA-256" in refused(train, capsys, *tiny, *to)
    to[to.index("--data.path") + 1] = str(others["same_letters"])  # nor at another place
    assert "began with a text of SHA-256" in refused(train, capsys, *tiny, *to)


def test_a_run_without_checkpoints_is_not_given_another_text(train, tiny, again, others, capsys):
    shutil.rmtree(again / "checkpoints")
    before = contents(again)
    text = refused(train, capsys, *tiny, "--run-dir", again, "--data.path", others["same_letters"])
    assert "holds a run with data.path=" in text
    assert contents(again) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_whose_reader_has_gone_is_saved(child, tiny, tmp_path, number):
    run_dir = tmp_path / "run"
    process = child("train.py", *tiny, "--run-dir", str(run_dir), "--train.log-every", "1", "--train.n-steps", "100000")
    while "step     2" not in (line := process.stdout.readline()):
        assert line
    process.stdout.close()  # as tee does, of Ctrl-C
    process.stderr.close()
    process.send_signal(number)
    assert process.wait(timeout=100) == 128 + number
    assert latest_step(run_dir) >= 2


def test_a_signal_that_comes_while_others_are_asked_is_kept(monkeypatch):
    stop = Stop()

    def waits(number):
        stop.number = signal.SIGTERM
        return number

    monkeypatch.setattr(loop, "any_says", waits)
    assert not loop.asked(stop)
    assert loop.asked(stop)


def test_what_a_failed_disk_and_a_kill_left_is_no_obstacle(run, train, again, capsys):
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo{"step": 20, "loss": 1}\n')
    (again / "tokenizer" / "tokenizer.json.1.part").write_text("{")
    train([str(again / "config.json"), "--run-dir", str(again), "--resume", "20"])
    assert_same_params(run, again)
    assert "lo{" not in (again / "metrics.jsonl").read_text()
    assert [path.name for path in (again / "tokenizer").iterdir()] == ["tokenizer.json"]


def test_other_shares_of_a_mixture_begin_anew(tmp_path):
    data = DataConfig(mixture="wiki=3,code=1")
    then, now = RunConfig(data=data), RunConfig(data=dataclasses.replace(data, mixture="wiki=1,code=3"))
    sums = {"text_sha256": "a", "tokenizer_sha256": "b"}  # of the same files
    saved, here = ({"config": fields_of(cfg)} | sums for cfg in (then, now))
    with pytest.raises(InputError, match=r"data.mixture='wiki=3,code=1', not 'wiki=1,code=3'"):
        check_same(tmp_path, now, saved, here)
    assert check_same(tmp_path, dataclasses.replace(now, change="data.mixture"), saved, here)
    assert not check_same(tmp_path, then, saved, saved)
    moved = RunConfig(data=dataclasses.replace(data, mixture="/there/wiki=3,code=1"))
    assert not check_same(tmp_path, moved, saved, {"config": fields_of(moved)} | sums)


def test_a_save_that_skipped_steps_put_off_is_made_up_for(run, train, tiny, tmp_path, monkeypatch):
    took = Report.took

    def skipped_at_20(self, step, metrics):
        took(self, step, metrics._replace(skipped=jnp.bool_(step == 20)))

    monkeypatch.setattr(Report, "took", skipped_at_20)
    train([*tiny, "--run-dir", str(tmp_path / "run")])
    assert saved_steps(tmp_path / "run") == [25, 40]


@pytest.mark.parametrize("n_full", [2, 3])
def test_the_last_save_waits_for_room(run, train, tiny, tmp_path, capsys, monkeypatch, n_full):
    usage, asked, run_dir = shutil.disk_usage(tmp_path), [], tmp_path / "run"

    def none_at_first(path):
        asked.append(path)
        return usage._replace(free=0 if 1 < len(asked) < 2 + n_full else usage.free)

    monkeypatch.setattr(shutil, "disk_usage", none_at_first)
    monkeypatch.setattr(loop, "TRIES", 2)
    monkeypatch.setattr(loop, "PATIENCE", 0)
    command = [*tiny, "--run-dir", str(run_dir)]
    if n_full == 3:
        text = refused(train, capsys, *command)
        assert text.startswith(
            f"error: step 40 is not saved in run_dir='{run_dir}': it needs 0.04 MB, and its disk has"
        )
        assert text.endswith(" 0.00 left, and step 20 is the newest that is; mend it, and run the same command again\n")
        assert saved_steps(run_dir) == [20]
    else:
        train(command)
        said = "0.00 left. The run waits for room, and tries again; Ctrl-C gives up\n"
        assert capsys.readouterr().out.count(said) == 2
        assert_same_params(run, run_dir)


def test_a_signal_saves_before_it_evaluates(train, tiny, tmp_path, monkeypatch):
    done = []

    class Told(loop.Saver):
        def __call__(self, step, state, data):
            done.append(("save", step))
            super().__call__(step, state, data)

    monkeypatch.setattr(loop, "Saver", Told)
    monkeypatch.setattr(Report, "validation", lambda self, step, found: done.append(("evaluate", step)))
    asked = iter(range(100))
    monkeypatch.setattr(loop, "asked", lambda stop: next(asked) == 8)
    with pytest.raises(SystemExit):
        train([*tiny, "--train.eval-every", "4", "--train.save-every", "4", "--run-dir", str(tmp_path / "run")])
    assert done == [("evaluate", 4), ("save", 4), ("save", 8), ("evaluate", 8)]


def test_a_tokenizer_that_is_not_the_checkpoints_is_not_used(sample, train, again, capsys):
    path = again / "tokenizer" / "tokenizer.json"
    other = json.loads(path.read_text())
    other["characters"] = other["characters"].replace("t", "z")
    path.write_text(json.dumps(other | {"characters": "".join(sorted(other["characters"]))}))
    assert "/tokenizer is not the one of its checkpoints; bring it back" in refused(sample, capsys, again)


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
    flags = ["--optim.peak-lr", "1e30", "--train.log-every", "4", "--train.save-every", "2", "--train.max-skipped", "6"]
    text = refused(train, capsys, *tiny, *flags, "--run-dir", run_dir)
    assert text == (
        "error: 6 steps in a row, 3 to 8, had a loss or gradient that is not finite; "
        "--resume 2, or an earlier step, with --change optim.peak-lr and a lower --optim.peak-lr\n"
    )
    assert saved_steps(run_dir) == [2]  # and none of those that were skipped
    params = load_pretrained(run_dir).params
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "skipped" in row] == [3, 4, 5, 6, 7, 8]
