"""The site's own pages: every public name is there once, with a docstring; their Python runs. `make docs` builds it."""

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

import tx_jax as tx
from tx_jax.inspect.journeys import TRAINING

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
PUBLIC = {name: getattr(tx, name) for name in tx.__all__}
PUBLIC |= {f"inspect.{name}": getattr(tx.inspect, name) for name in tx.inspect.__all__}  # presets: with their module
CODE = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}


def named(path):
    """What `::: path` names; of a function and a module by one name, `import_module` gives the module."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_rendered_once():
    paths = [path for text in PAGES.values() for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    times = Counter(id(named(path)) for path in paths)
    assert {name: times[id(value)] for name, value in PUBLIC.items()} == dict.fromkeys(PUBLIC, 1)
    assert set(times.values()) == {1}


@pytest.mark.parametrize("name", [name for name, blocks in CODE.items() if blocks])
def test_python_blocks_run(name):
    exec("\n".join(CODE[name]), {})


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md"])
def test_no_line_begins_with_a_number_and_a_dot(path):
    """The site would take it for an item of a list, and leave the number out."""
    assert not re.findall(r"^ *\d+\. .*", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_journey_that_is_drawn_is_the_one_in_the_table():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [row for row in text.split("**Sampling**")[0].splitlines() if row.startswith("| ")][1:]
    for row, station in zip(rows, TRAINING.stations, strict=True):
        assert row.startswith(f"| {station.title}")
        assert [name for name in re.findall(r"\w+\.py", station.files) if f"{name}`" not in row] == []
