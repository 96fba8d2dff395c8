"""What a user gets wrong: one line on standard error, exit code 2, and nothing written."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tx_jax.command_line import one_line_errors, parse_run
from tx_jax.config import ModelConfig
from tx_jax.run_config import OptimConfig
from tx_jax.run_dir import write_config
from tx_jax.run_presets import RUNS

ROOT = Path(__file__).parents[2]

# {new} is a directory that is not there, {run} a finished run, {bad} the folder that `bad` makes.
TRAIN = {  # flags after those of the small run: what the message says, value and remedy
    "--data.path {bad}/missing.txt": "path='{bad}/missing.txt' does not exist; give a UTF-8 text file or a directory",
    "--data.path {bad}/empty.txt": "path='{bad}/empty.txt' is empty; there is nothing to train on",
    "--data.path {bad}/latin1.txt": "{bad}/latin1.txt is not UTF-8: byte 0xe9 at offset 3; convert it",
    "--data.path {bad}/empty": "path='{bad}/empty' holds no *.txt; rename the texts, or give one file",
    "--data.path {bad}/other": "path='{bad}/other' holds no *.txt; rename the texts",
    "--data.path {bad}/short.txt": "validation split has 3 tokens, but seq_len=16 needs 17; use a shorter",
    "--data.path {bad}/long.txt --data.seq-len 999": "data.seq_len=999 exceeds model.max_len=64; raise model.max_len",
    "--data.valid-fraction 2": "valid_fraction=2.0 must be between 0 and 1; 0.1 holds out a tenth",
    "--data.batch-size 12": "batch_size=12 must be a multiple of the 8 devices that share it; use 8",
    "--mesh.data 3": "mesh data=3 needs 3 devices; there are 8",
    "--mesh.data 0": "mesh.data=0 must be at least 1, or None",
    "--model.vocab-size 3": "model.vocab_size=3 is not the tokenizer's 15; leave it out",
    "--model.n-heads 3": "d_model=16 must be a multiple of n_heads=3; use 1, 2, 4, 8, 16 heads, or set d_head",
    "--model.stack encoder": "data.objective='next_token' trains model.stack='decoder', not 'encoder'; change",
    "--train.seed 4294967296": "seed=4294967296 must be from 0 to 2³² − 1",
    "--train.sample-prompt €": "character '€' at index 0 is not among the 15 of this tokenizer; leave it out, or use",
    "--train.sample-prompt=": "train.sample_prompt has 0 tokens; it must have 1 to 63, less than model.max_len",
    "--train.sample-prompt " + 64 * "a": "train.sample_prompt has 64 tokens; it must have 1 to 63, less than",
    "--run-dir {run} --model.n-layers 2": "holds a run with model.n_layers=1, not 2; use another --run-dir",
    "--run-dir {run} --data.path {bad}/upper.txt": "holds a run with another tokenizer, such as that of another",
    "--run-dir {bad}/other": "run_dir='{bad}/other' holds files but no config.json; use another --run-dir",
    "--run-dir {bad}/short.txt": "run_dir='{bad}/short.txt' is a file; use another --run-dir",
    "--run-dir {bad}/corrupt": "config.json cannot be read: not JSON (Expecting",
    "--run-dir=": "run_dir='' names no directory; use --run-dir runs/NAME",
    "--model.n-hads 4": "Unrecognized options: --model.n-hads, 4; did you mean --model.n-heads?",
    "--profil": "Unrecognized options: --profil; did you mean --profile?",
    "--model.n-heads many": "--model.n-heads: invalid literal for int() with base 10: 'many'; see train.py gpt-shake",
    "--model.window wide": "could be instantiated from ['wide']; see train.py gpt-shakespeare --help",
    "--optim.schedule cosin": "invalid choice 'cosin' for argument '--optim.schedule'. Expected one of ('constant',",
    "--model.n-heads": "Missing value for argument '--model.n-heads'. Expected 1 values; see train.py",
    "--optim.beta1 nan": "beta1=nan must be a finite number",
    "--train.keep-best --train.eval-every 0": "keep_best needs a validation loss, which eval_every=0 never takes; give",
    "--run-dir /dev/full/run": "run_dir='/dev/full/run' cannot be written to (Not a directory); make room and give",
    "--run-dir {bad}/short.txt/run": "short.txt/run' cannot be written to (Not a directory); make room and give rights",
}  # fmt: skip
FIRST = {  # the first word: what the message says
    "gpt-shakespere": "preset='gpt-shakespere' is not one of {presets}; did you mean 'gpt-shakespeare'?",
    "bert": "preset='bert' is not one of {presets}; or give a CONFIG.json",
    "{bad}/missing.json": "config='{bad}/missing.json' does not exist; give a config.json, or one of {presets}",
    "{bad}/latin1.json": "config='{bad}/latin1.json' cannot be read: 'utf-8' codec can't decode byte 0xe9",
    "{bad}/corrupt/config.json": "cannot be read: not JSON (Expecting property name enclosed in double quotes",
}  # fmt: skip
SAMPLE = {
    "{run} --prompt €": "character '€' at index 0 is not among the 15 of this tokenizer; leave it out",
    "{run} --prompt " + 64 * "a": "64 tokens and max_new_tokens=1 exceed max_len=64; shorten it to at most 63",
    "{run} --prompt=": "prompt='' is empty; give at least one character",
    "{run} --prompt @{bad}/empty.txt": "prompt='@{bad}/empty.txt' is empty; give at least one character",
    "{run} --prompt @{bad}/missing.txt": "cannot be read (No such file or directory); name a file after the @",
    "{run} --prompt @{bad}/latin1.txt": "is not UTF-8: byte 0xe9 at offset 3; convert it, such as by iconv",
    "{run} --temperature -1": "temperature=-1.0 must be 0, which is greedy, or more",
    "{run} --temperature nan": "temperature=nan must be 0, which is greedy, or more",
    "{run} --temperature 0 --top-k 3": "top_k without a temperature above 0 would be ignored; set one, such as 1.0",
    "{run} --top-p 0": "top_p=0.0 must be in (0, 1]; leave it out",
    "{run} --top-p 2": "top_p=2.0 must be in (0, 1]; leave it out",
    "{run} --min-p 3": "min_p=3.0 must be in [0, 1]; leave it out",
    "{run} --top-k 0": "top_k=0 must be a whole number, at least 1; leave it out",
    "{run} --typical-p 0": "typical_p=0.0 must be in (0, 1]; leave it out",
    "{run} --eta-cutoff 1": "eta_cutoff=1.0 must be in (0, 1); leave it out",
    "{run} --epsilon-cutoff -1": "epsilon_cutoff=-1.0 must be in [0, 1); leave it out",
    "{run} --repetition-penalty 0": "repetition_penalty=0.0 must be positive; 1 or None leaves it out",
    "{run} --frequency-penalty inf": "frequency_penalty=inf must be finite; 0 or None leaves it out",
    "{run} --no-repeat-ngram -1": "no_repeat_ngram=-1 must be a whole number, at least 0, which leaves it out",
    "{run} --min-new-tokens 3": "min_new_tokens=3 needs an eos_id; give one",
    "{run} --stop=": "stops=[''] holds an empty text, at which every text would stop; leave it out",
    "{run} --stop a --regex b": "--stop and --regex cannot both say where a text ends; leave one out",
    "{run} --regex a --json-schema {{}}": "--regex and --json-schema cannot both say where a text ends; leave one out",
    "{run} --regex=": "regex='' matches no text; give a pattern, or leave it out",
    "{run} --regex (a": "pattern='(a' is no regular expression for these tokens",
    "{run} --regex xyz": "pattern='xyz' is no regular expression for these tokens",
    '{run} --json-schema {{"type":"strin"}}': "schema is no JSON schema that can be held",
    "{run} --json-schema {bad}/missing.json": "json_schema='@{bad}/missing.json' cannot be read (No such file or dir",
    "{run} --input {bad}/short.txt": "--input and --output go together; give both, or leave both out",
    "{run} --output {new}": "--input and --output go together; give both, or leave both out",
    "{run} --batch-size 4": "--batch-size is for --input; give one, or leave it out",
    "{run} --input a --output {new} --batch-size 0": "batch_size=0 must be at least 1",
    "{run} --input a --output {new} --prompt a": "--prompt is not for --input; leave one out",
    "{run} --input a --output {new} --interactive": "--interactive is not for --input; leave one out",
    "{run} --input a --output {new} --stream": "--stream is not for --input; leave one out",
    "{run} --input a --output {new} --num-samples 2": "--num-samples is not for --input; leave one out",
    "{run} --input a --output {new} --perplexity a": "--perplexity is not for --input; leave one out",
    "{run} --input a --output {new} --source a": "--source is not for --input; leave one out",
    "{run} --input {bad}/short.txt --output {new}": "line 1 of {bad}/short.txt: 'the cat sat on a mat.' is not JSON",
    "{run} --perplexity a": "perplexity='a' has 1 tokens; give a text of at least two",
    "{run} --num-samples 0": "num_samples=0 must be at least 1; leave it out for one",
    "{run} --num-samples 2 --stream": "num_samples=2 cannot be streamed; leave out --stream, or ask for one",
    "{run} --max-new-tokens 0": "max_new_tokens=0 must be at least 1",
    "{run} --max-new-tokens 64": "a prompt of 1 tokens and max_new_tokens=64 exceed max_len=64; ask for at most 63",
    "{run} --seed -1": "seed=-1 must be from 0 to 2³² − 1",
    "{run} --step 7": "step=7 is not in run_dir='{run}'; it has 20, 40",
    "{new}": "model '{new}' does not exist; give a name (smollm2, minilm), a directory in Hugging Face's",
    "smolm2": "model 'smolm2' does not exist; did you mean smollm2? Or give a name (smollm2, minilm)",
    "~nosuch/x": "model '~nosuch/x' does not exist; give a name (smollm2, minilm), a directory in Hugging Face's",
    "x" * 300: "xxx' does not exist; give a name (smollm2, minilm), a directory in Hugging Face's",
    "{bad}/other": "cannot read {bad}/other/config.json (No such file or directory); give the directory of",
    "{bad}/corrupt": "config.json is not JSON (Expecting",
    "{bad}/model.bin": "{bad}/model.bin is a pickle, which can run any code when it is loaded; give safetensors",
    "{bad}/upper.txt": "{bad}/upper.txt is no model; give a name (smollm2, minilm), a directory",
    "{run} --interactive": "--interactive is for a model with a chat template, without --raw",
    "{run} --interactive --prompt a": "--interactive reads what you type, not --prompt; leave one out",
    "{run} --system be --prompt a": "--system is for a model with a chat template, without --raw",
    "{bad}/untrained": "run_dir='{bad}/untrained' holds no checkpoint; train with --run-dir {bad}/untrained up to a",
    "{run} --temprature 1": "Unrecognized options: --temprature, 1; did you mean --temperature?",
    "{run} --top-k 1.5": "could be instantiated from ['1.5']; see sample.py --help",
    "--seed 1": "Missing from sample.py: MODEL a run directory of train.py, a Hugging Face directory, a GGUF file",
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(run, text, tmp_path_factory):
    """A folder of things that no run can be made of."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "other", "corrupt", "untrained"):
        (folder / name).mkdir()
    (folder / "other" / "notes.md").write_text("not a run\n")
    (folder / "corrupt" / "config.json").write_text((run / "config.json").read_text()[:-3] + ",")
    shutil.copy(run / "config.json", folder / "untrained")
    (folder / "empty.txt").touch()
    (folder / "model.bin").touch()
    (folder / "short.txt").write_text("the cat sat on a mat.\n")
    (folder / "upper.txt").write_text(text.read_text().upper())
    for name in ("latin1.txt", "latin1.json"):
        (folder / name).write_bytes("café".encode("latin1"))
    shutil.copy(text, folder / "long.txt")
    return folder


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(run, bad, tmp_path, capsys):
    """Holds a call to the promise, and gives the line."""

    def line(main, args, says, notes=0):
        names = {"run": run, "bad": bad, "new": tmp_path / "new", "presets": ", ".join(RUNS)}
        before = contents(run), contents(bad)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([arg.format(**names) for arg in args])
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert err.count("\n") == 1 + notes
        assert err.endswith("\n")
        err = err.splitlines(keepends=True)[-1]
        assert err.startswith("error: ")
        assert says.format(**names) in err
        assert not (tmp_path / "new").exists()
        assert (contents(run), contents(bad)) == before

    return line


@pytest.mark.parametrize("flags", TRAIN)
def test_train_refuses(train, tiny, refused, flags):
    at = [] if "--run-dir" in flags else ["--run-dir", "{new}"]
    replaced = {flag for flag in flags.replace("=", " ").split() if flag.startswith("--")}
    kept = [word for pair in zip(tiny[1::2], tiny[2::2], strict=True) if pair[0] not in replaced for word in pair]
    refused(train, [tiny[0], *kept, *at, *flags.split()], TRAIN[flags])


@pytest.mark.parametrize("first", FIRST)
def test_train_refuses_the_first_word(train, refused, first):
    refused(train, [first] if first else [], FIRST[first])


@pytest.mark.parametrize("flags", SAMPLE)
def test_sample_refuses(sample, refused, flags):
    refused(sample, flags.split(), SAMPLE[flags])


def test_a_short_name_that_is_a_path_too(sample, refused, monkeypatch, tmp_path):
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(sample, ["minilm"], "model 'minilm' is a short name, and also a path here; write ./minilm for the path, or")
    refused(sample, ["./minilm"], "cannot read minilm/config.json (No such file or directory)")


def test_offline_without_the_corpus(train, refused, monkeypatch, tmp_path):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "TX_JAX_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    says = "give this Python pip and a network, or train on a text of your own with --data.path FILE"
    refused(train, ["gpt-shakespeare", "--run-dir", "{new}"], says, notes=1)  # that it fetches


def test_a_process_on_a_terminal_gets_the_same_line(tiny, tmp_path):
    terminal, side = os.openpty()
    command = [sys.executable, ROOT / "train.py", *tiny, "--model.n-hads", "4", "--run-dir", tmp_path / "new"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, stdin=side, stdout=side, stderr=subprocess.PIPE, text=True, check=False, env=env)
    os.close(side)
    os.close(terminal)
    assert done.returncode == 2
    assert done.stderr == "error: Unrecognized options: --model.n-hads, 4; did you mean --model.n-heads?\n"
    assert not (tmp_path / "new").exists()


def test_ctrl_c_and_errors_of_the_system(capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    for error, code in ((KeyboardInterrupt(), 130), (OSError(2, "gone"), 2), (MemoryError("373 GiB"), 2)):
        with pytest.raises(SystemExit) as end, one_line_errors():
            raise error
        assert end.value.code == code
    says = "error: [Errno 2] gone\nerror: out of memory; ask for less, such as a smaller batch: 373 GiB\n"
    assert capsys.readouterr().err == says


HELP = {  # script, flags: what is on standard output
    ("train", "--help"): "presets:\n  gpt-shakespeare           The demo: nanoGPT's size (",
    ("train", "gpt-shakespeare --help"): "--model.n-kv-heads {None}|INT",
    ("sample", "--help"): "--max-new-tokens {None}|INT",
}


@pytest.mark.parametrize(("name", "flags"), HELP)
def test_help(request, capsys, name, flags):
    with pytest.raises(SystemExit) as end:
        request.getfixturevalue(name)(flags.split())
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert HELP[name, flags] in out


def test_defaults_preset_file_flags(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"run_dir": "runs/a", "optim": {"beta2": 0.5}}')
    run = parse_run([str(file), "--optim.beta1", "0.25", "--model.no-tie-head"])
    assert (run.run_dir, run.optim.beta2, run.optim.beta1, run.optim.eps) == ("runs/a", 0.5, 0.25, OptimConfig().eps)
    assert (run.model.tie_head, run.model.d_model) == (False, ModelConfig().d_model)
    for name, make in RUNS.items():
        assert parse_run([name]) == make("cpu")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_on_another_kind_of_device(name, tmp_path):
    """The same command: what a preset has for where the run began."""
    flags = [name, "--run-dir", str(tmp_path), "--train.n-steps", "9", "--optim.warmup-steps", "1"]
    begun = dataclasses.replace(
        (made := RUNS[name]("tpu")),
        run_dir=str(tmp_path),
        train=dataclasses.replace(made.train, n_steps=9),
        optim=dataclasses.replace(made.optim, warmup_steps=1),
    )
    here = parse_run(flags)
    write_config(tmp_path, begun)
    assert parse_run(flags) == begun
    assert here.model.dtype == "float32"
    assert parse_run([*flags, "--model.dtype", "float32"]).model.dtype == "float32"  # which is then refused


def test_a_run_of_other_flags_is_that_of_this_kind_of_device(tmp_path):
    write_config(tmp_path, dataclasses.replace(RUNS["gpt-shakespeare"]("tpu"), model=ModelConfig(d_model=8, n_heads=1)))
    assert parse_run(["gpt-shakespeare", "--run-dir", str(tmp_path)]).model == RUNS["gpt-shakespeare"]("cpu").model
