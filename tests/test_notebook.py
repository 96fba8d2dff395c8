"""The notebooks run from top to bottom as they stand; the one that trains for minutes, with a small run instead."""

import base64
import os
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jupyter's own deprecations
    import nbclient
    import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SMALL = "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --train.n-steps 4 --optim.warmup-steps 1"
PICTURES = {"attention": 5, "kv_cache": 3, "research": 0}  # of the notebooks that run in a minute or so


def run(notebook, monkeypatch, tmp_path):
    """Run it, and give what it printed, and its pictures."""
    paths = [str(NOTEBOOKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.delenv("XLA_FLAGS")  # one device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [
        base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]
    return "".join(output.get("text", "") for output in outputs), pictures


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_no_output_is_kept(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("name", PICTURES)
def test_runs_as_it_stands(name, tmp_path, monkeypatch):
    _, pictures = run(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4), monkeypatch, tmp_path)
    assert len(pictures) >= PICTURES[name]
    assert all(len(picture) > 5000 for picture in pictures)  # bytes: an empty one has less


def test_train_on_colab(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("ROMEO: what light\nthrough yonder window breaks?\n" * 60)
    notebook = nbformat.read(NOTEBOOKS / "train_on_colab.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source += f"\nRUN_DIR, FLAGS = {str(tmp_path / 'run')!r}, {[*SMALL.split(), '--data.path', str(text)]!r}"
    printed, _ = run(notebook, monkeypatch, tmp_path)
    assert "continuing after step 4 of 4" in printed
    assert (tmp_path / "run" / "plots" / "loss.png").exists()
