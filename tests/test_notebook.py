"""The notebooks run from top to bottom as they stand; those that train for minutes, with a small run instead."""

import base64
import importlib.util
import os
import subprocess
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tx_jax.command_line import parse_run
from tx_jax.convert.named import fetch_model
from tx_jax.data.corpora import load_text
from tx_jax.training.loop import fit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jupyter's own deprecations
    import nbclient
    import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
SMALL = """--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --data.batch-size 8 --train.n-steps 4
    --optim.warmup-steps 1"""
SHORT = """--model.d-model 32 --model.d-mlp 32 --train.n-steps 60 --train.save-every 10 --train.eval-every 0
    --train.sample-every 0 --optim.warmup-steps 20 --data.test-fraction 0.002"""
FEW = "--train.n-steps 20 --data.seq-len 64"
PICTURES = {"attention": 5, "kv_cache": 3, "research": 0}  # of the notebooks that run in a minute or so


def read(name, *more):
    """A notebook, with more lines in its first cell of code."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = "\n".join([first.source, *more])
    return notebook


def run(notebook, monkeypatch, tmp_path, compiled="well"):
    """Run it, and give what it printed, and its pictures."""
    paths = [str(NOTEBOOKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    flags = [] if compiled == "well" else os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [
        base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]
    assert all(len(picture) > 5000 for picture in pictures)  # bytes: an empty one has less
    return "".join(output.get("text", "") for output in outputs), pictures


@pytest.mark.parametrize("name", NAMES)
def test_no_output_is_kept(name):
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in read(name).cells)


def upto_install(name):
    """The code up to the cell that installs."""
    code = [cell.source for cell in read(name).cells if cell.cell_type == "code"]
    end = next(i for i, source in enumerate(code) if "pip" in source)
    return "\n".join(code[: end + 1])


SPECS = {  # what Python finds by the name of the package: how often pip is asked
    "nothing": (None, 1),
    "a clone beside the notebook, which is no package": (ModuleSpec("tx_jax", None, is_package=True), 1),
    "the package": (ModuleSpec("tx_jax", None, origin="tx_jax/__init__.py", is_package=True), 0),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("found", SPECS)
def test_installs_what_is_not_there(name, found, monkeypatch):
    spec, n_asked = SPECS[found]
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command[-1]))
    exec(upto_install(name), {})
    assert len(asked) == n_asked
    for wanted in map(Requirement, asked):
        assert (wanted.name, wanted.url) == ("tx_jax", "file:///content/tx_jax")
        assert {"plots"} <= wanted.extras <= {"plots", "hf", "gguf", "translate"}


@pytest.mark.parametrize("name", ["train_on_colab", "translate", "llama"])
def test_saves_to_drive_if_asked(name, monkeypatch):
    mounted, space = [], {}
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    exec(upto_install(name), space)
    assert not mounted
    exec(upto_install(name).replace("SAVE_TO_DRIVE = False", "SAVE_TO_DRIVE = True"), space)
    assert mounted == ["/content/drive"]
    assert (space.get("RUN_DIR") or space["RUNS"]).startswith("/content/drive/MyDrive/tx_jax")


@pytest.mark.parametrize("name", PICTURES)
def test_runs_as_it_stands(name, tmp_path, monkeypatch):
    _, pictures = run(read(name), monkeypatch, tmp_path)
    assert len(pictures) >= PICTURES[name]


def test_train_on_colab(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("ROMEO: what light\nthrough yonder window breaks?\n" * 60)
    flags = [*SMALL.split(), "--data.path", str(text)]
    fit(parse_run(["gpt-shakespeare", "--run-dir", str(tmp_path / "run"), *flags, "--train.n-steps", "2"]))
    flags += ["--change", "train.n-steps"]
    printed, _ = run(read("train_on_colab", "RUN_DIR = 'run'", f"FLAGS = {flags}"), monkeypatch, tmp_path, "quickly")
    assert printed.index("continuing after step 2 of 4") < printed.index("continuing after step 4 of 4")
    assert (tmp_path / "run" / "plots" / "loss.png").exists()


def test_translate(tmp_path, monkeypatch):
    printed, pictures = run(read("translate", f"FLAGS = {SHORT.split()}"), monkeypatch, tmp_path, "quickly")
    assert printed.count("exact, BLEU") == 4  # of two checkpoints, greedily and by beams
    assert len(pictures) == 4


def test_llama(fetched, tmp_path, monkeypatch):
    fetched(fetch_model, "smollm2")
    fetched(load_text, None)
    printed, pictures = run(read("llama", f"FLAGS = {FEW.split()}"), monkeypatch, tmp_path)
    assert printed.count("Paris") >= 2  # in its answer, and as a block's guess
    before, after = (float(line.split()[2]) for line in printed.splitlines() if ": perplexity" in line)
    assert after < before
    assert "LlamaForCausalLM" in printed
    assert "the largest difference 0\n" in printed
    assert len(pictures) == 1
