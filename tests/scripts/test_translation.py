"""train.py on pairs and sample.py --source: a small model that learns to spell words backwards."""

import json
import shutil

import numpy as np
import pytest

from tests.scripts.test_train import assert_same_params, records
from tx_jax.checkpoint import restore_params
from tx_jax.convert.sources import load_pretrained
from tx_jax.run_dir import read_config

TINY = """number-words
    --model.n-layers 1 --model.d-model 32 --model.d-mlp 64 --model.n-heads 2 --model.max-len 12
    --model.dropout-rate 0.1 --data.vocab-size 280 --data.seq-len 12 --data.batch-size 16
    --data.valid-fraction 0.1 --data.test-fraction 0.1 --optim.peak-lr 1e-2 --optim.warmup-steps 5
    --train.n-steps 60 --train.log-every 20 --train.eval-every 30 --train.sample-every 60 --train.save-every 20
    --train.keep 3 --train.n-averaged 2 --train.n-scored 20"""


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A table of 300 words of three letters, and the same backwards."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), 3)) for _ in range(300)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    path.write_text("".join(f"{word}\t{word[::-1]}\n" for word in words))
    return path


@pytest.fixture(scope="session")
def command(pairs):
    return [*TINY.split(), "--data.path", str(pairs)]


@pytest.fixture(scope="module")
def spelled(train, command, tmp_path_factory, own_cache):
    run_dir = tmp_path_factory.mktemp("runs") / "spelled"
    train([*command, "--run-dir", str(run_dir)])
    return run_dir


@pytest.fixture
def translate(spelled, sample, capsys):
    """The lines that sample.py writes, by its flags."""

    def written(*flags):
        capsys.readouterr()
        sample([str(spelled), *flags])
        return capsys.readouterr().out.split("\n")[:-1]

    return written


def refused(call, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        call()
    return capsys.readouterr().err


def test_a_run_of_pairs_is_scored_on_the_way_and_at_the_end(spelled):
    rows = records(spelled)
    scored = [row for row in rows if "valid_loss" in row]
    assert [row["step"] for row in scored] == [30, 60]
    assert all(row.keys() == {"step", "valid_loss", "bleu", "chrf", "exact_match"} for row in scored)
    assert scored[1]["valid_loss"] < scored[0]["valid_loss"]
    (test,) = [row for row in rows if "test_bleu" in row]
    assert test.keys() == {"step", "test_bleu", "test_chrf", "test_exact_match"}
    assert (spelled / "samples.txt").read_text().count("→") == 4


def test_what_is_sampled_is_the_mean_of_the_last_checkpoints(spelled):
    assert read_config(spelled).train.n_averaged == 2
    params = load_pretrained(spelled).params
    one, other = (restore_params(spelled, params, step)["embed"]["table"] for step in (40, 60))
    np.testing.assert_allclose(params["embed"]["table"], (one + other) / 2, rtol=1e-6)
    assert not np.allclose(one, other)


def test_going_on_after_a_kill_is_bit_exact(spelled, train, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(spelled, again)
    shutil.rmtree(again / "checkpoints" / "60")
    train([str(spelled / "config.json"), "--run-dir", str(again)])
    assert_same_params(spelled, again)
    assert records(again)[-1] == records(spelled)[-1]  # the test's scores


def test_running_again_when_done_changes_nothing(spelled, train):
    before = records(spelled)
    train([str(spelled / "config.json")])
    assert records(spelled) == before


def test_a_mean_over_steps_is_kept_evaluated_and_sampled(train, sample, command, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train([*command, "--run-dir", str(run_dir), "--train.n-averaged", "1", "--train.ema-rate", "0.9"])
    params = load_pretrained(run_dir).params
    ema, last = (restore_params(run_dir, params, part=part)["embed"]["table"] for part in ("ema", "params"))
    np.testing.assert_array_equal(params["embed"]["table"], ema)
    assert not np.allclose(ema, last)
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "checkpoints" / "60")
    train([str(run_dir / "config.json"), "--run-dir", str(again)])
    np.testing.assert_array_equal(load_pretrained(again).params["embed"]["table"], ema)


def test_a_line_a_file_and_standard_input(spelled, translate, child, tmp_path):
    lines = ["abc", "", "fed", "abc", "a"]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(lines) + "\n")
    told = translate("--source", f"@{path}")
    assert len(told) == 5
    assert told[1] == ""
    assert told[0] == told[3]
    for line, best in zip(lines, told, strict=True):
        assert not line or translate("--source", line) == [best]  # alone, as among others
    process = child("sample.py", spelled, "--source", "-")
    out, err = process.communicate(path.read_text(), timeout=100)
    assert (process.returncode, out.split("\n")[:-1]) == (0, told)
    assert err.startswith("4 translated in ")
    path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n"))
    assert translate("--source", f"@{path}") == told


def test_n_best_are_told_with_their_scores(translate):
    rows = [row.split("\t")[1:] for row in translate("--source", "abc", "--n-best", "3")]
    assert len(rows) == 3
    scores = [float(score) for score, _ in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[2]
    assert translate("--source", "abc") == [rows[0][1]]


def test_drawn_translations_are_the_seeds(translate):
    drawn = [translate("--source", "abcdef", "--temperature", "3", "--seed", str(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "nan" not in "".join(translate("--source", "abc", "--temperature", "3", "--n-best", "2"))
    greedy = translate("--source", "abcdef", "--temperature", "0")
    assert translate("--source", "abcdef", "--n-beams", "1") == greedy
    assert translate("--source", "abcdef", "--top-k", "1") == greedy


def test_what_a_translation_attends_to_is_drawn(translate, tmp_path):
    path = tmp_path / "attention.svg"
    (tmp_path / "lines").write_text("\nabc\nfed\n")
    assert len(translate("--source", f"@{tmp_path / 'lines'}", "--show-attention", str(path))) == 3
    assert path.read_text().startswith("<?xml")


def test_a_source_that_is_too_long_is_refused_or_cut(spelled, sample, translate, capsys, tmp_path):
    long = "abcdef" * 9
    err = refused(lambda: sample([str(spelled), "--source", long]), capsys)
    assert "error: text 1 has " in err
    assert "more than the model's max_len=12; shorten it, or cut it by truncate=True (--truncate)" in err
    assert len(translate("--source", long, "--truncate")) == 1
    (tmp_path / "lines").write_text(f"abc\n\n{long}\n")
    err = refused(lambda: sample([str(spelled), "--source", f"@{tmp_path / 'lines'}"]), capsys)
    assert "error: text 3 has " in err


ERRORS = {
    "--source abc --prompt x": "--prompt is for a text that goes on, not for --source; leave one out",
    "--source abc --num-samples 2": "num_samples=2 is not for --source; give --n-best",
    "--source abc --n-best 0": "n_beams=4 must be at least 1, which is greedy, and n_best=0 at least 1",
    "--source abc --n-beams 0": "n_beams=0 must be at least 1, which is greedy, and n_best=1 at least 1",
    "--source @none": "source='@none' cannot be read (No such file or directory); name a file after the @",
    "--source abc --show-attention none/x.png": "does not exist, where x.png is to be drawn; make it first",
    "--source abc --raw": "--raw is for a text that goes on, not for --source; leave one out",
    "--source abc --n-best 5": "n_best=5 must be from 1 to n_beams=4; ask for fewer or search wider",
    "--source abc --temperature 0 --n-best 2": "temperature=0 gives one translation, not n_best=2",
    "--source abc --temperature 0 --top-k 3": "top_k without a temperature above 0 would be ignored; set one",
    "--n-best 2": "--n-best is for a --source; give one, or leave it out",
    "--prompt abc --show-attention x.png": "--show-attention is for a --source; give one, or leave it out",
    "--source abc --show-attention x.none": "x.none is not a picture's name; end it with .png or .svg",
    "--prompt abc": "is no decoder but of kind encoder_decoder; give it a --source TEXT",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_errors_of_sources(spelled, sample, capsys, flags):
    assert ERRORS[flags] in refused(lambda: sample([str(spelled), *flags.split()]), capsys)


def test_a_stream_that_is_not_utf8_names_its_line(spelled, child):
    process = child("sample.py", spelled, "--source", "-")
    process.stdin.buffer.write(b"abc\nab\xff\n")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert "error: line 2 of standard input is not UTF-8; convert it, such as by iconv" in err


def test_a_decoder_does_not_translate(run, sample, capsys):
    err = refused(lambda: sample([str(run), "--source", "the cat"]), capsys)
    assert "is no encoder_decoder but of kind decoder; give it a --prompt TEXT" in err


def test_pairs_that_are_too_long_are_refused_or_left_out(train, command, pairs, tmp_path, capsys):
    path = tmp_path / "long.tsv"
    path.write_text(pairs.read_text() + "abcdef" * 9 + "\tx\n")
    own = [*command, "--data.path", str(path), "--train.n-steps", "5", "--run-dir"]
    err = refused(lambda: train([*own, str(tmp_path / "refused")]), capsys)
    assert f"{path}: 1 of 301 lines cannot be used: line 301 has " in err
    assert "tokens, more than data.seq_len=12. Mend them, or leave them out by --data.bad-lines skip" in err
    assert not (tmp_path / "refused").exists()
    train([*own, str(tmp_path / "skipped"), "--data.bad-lines", "skip"])
    assert "line 301 has " in capsys.readouterr().err


def test_other_pairs_do_not_go_on(train, command, pairs, spelled, tmp_path, capsys):
    path = tmp_path / "other.tsv"
    path.write_text("".join(sorted(pairs.read_text().splitlines(keepends=True))))  # of which the same tokens are learnt
    again = tmp_path / "again"
    shutil.copytree(spelled, again)
    config = json.loads((again / "config.json").read_text())
    config["data"]["path"] = str(path)
    (again / "config.json").write_text(json.dumps(config))
    err = refused(lambda: train([str(again / "config.json"), "--run-dir", str(again)]), capsys)
    assert "began with a text of SHA-256" in err


@pytest.mark.parametrize("preset", ["span-corruption", "masked-lm", "prefix-lm"])
def test_other_objectives_train_and_show_what_they_learnt(preset, train, text, tmp_path, capsys):
    small = """--model.n-layers 1 --model.d-model 32 --model.n-heads 2 --data.vocab-size 300 --data.seq-len 32
        --data.batch-size 8 --optim.warmup-steps 5 --optim.peak-lr 1e-2 --train.n-steps 60 --train.log-every 20
        --train.eval-every 30 --train.sample-every 60 --train.save-every 30"""
    command = [preset, *small.split(), "--data.path", str(text), "--run-dir"]
    train([*command, str(tmp_path / "run")])
    losses = [row["valid_loss"] for row in records(tmp_path / "run") if "valid_loss" in row]
    assert losses[1] < losses[0] or losses[1] < 1
    shown = (tmp_path / "run" / "samples.txt").read_text()
    assert {"span-corruption": "<extra_id_0>", "masked-lm": "<mask>", "prefix-lm": "=== step 60"}[preset] in shown
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(again / "checkpoints" / "60")
    train([*command, str(again)])
    assert records(again)[-1] == records(tmp_path / "run")[-1]


OTHER_ERRORS = {
    "prefix-lm --model.window 8": "model.window=8 hides a prefix; leave it out with data.objective='prefix_lm'",
    "span-corruption --data.seq-len 8 --model.max-len 8": "data.seq_len=8 gives corrupted texts of 9 tokens, more than",
    "masked-lm --data.tokenizer char": "tokenizer='char' has no special tokens such as <mask>, which the objective",
    "prefix-lm --data.objective masked_lm": "data.objective='masked_lm' trains model.stack='encoder', not 'decoder'",
}


@pytest.mark.parametrize("flags", OTHER_ERRORS)
def test_errors_of_objectives(flags, train, text, tmp_path, capsys):
    command = [*flags.split(), "--data.path", str(text), "--data.vocab-size", "300", "--run-dir", str(tmp_path / "run")]
    assert OTHER_ERRORS[flags] in refused(lambda: train(command), capsys)
    assert not (tmp_path / "run").exists()


def test_pairs_do_not_begin_with_another_model(train, command, run, tmp_path, capsys):
    own = [*command, "--init", str(run), "--run-dir", str(tmp_path / "run")]
    err = refused(lambda: train(own), capsys)
    assert "cannot begin a run with data.objective='translate', which has tokens of its own; leave it out" in err or (
        "cannot be chosen with --init" in err
    )
