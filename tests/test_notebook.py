"""The notebook runs from top to bottom as it stands, with a small run in its first cell."""

import os
import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jupyter's own deprecations
    import nbclient
    import nbformat

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "train_on_colab.ipynb"
SMALL = "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --train.n-steps 4 --optim.warmup-steps 1"


def test_train_on_colab(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("ROMEO: what light\nthrough yonder window breaks?\n" * 60)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source += f"\nRUN_DIR, FLAGS = {str(tmp_path / 'run')!r}, {[*SMALL.split(), '--data.path', str(text)]!r}"
    paths = [str(NOTEBOOK.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.delenv("XLA_FLAGS")  # one device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "continuing after step 4 of 4" in printed
    assert (tmp_path / "run" / "plots" / "loss.png").exists()
