"""Imports go down only: a module imports modules of a lower rank; and `import tx_jax` is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tx_jax"
RANKS = {  # of every module of the package
    "errors": -3, "config_checks": -1, "config_json": -1,
    "config": 0, "run_config": 1,
    "ops.masks": -2, "ops.spread": -1, "ops.int8": -1, "fuse": 0, "ops.kernels": 0, "ops.attention": 1,
    "ops.positions": 0,
    "training.losses": 0, "decoding.rules": 0, "decoding.samplers": 1, "decoding.automaton": 0, "decoding.grammar": 1,
    "data.tokenizers": -2, "data.wheels": -1, "data.corpora": 0, "data.batches": 0, "data.objectives": 1,
    "convert.files": 0, "convert.named": 0,
    "data.libraries": -1, "data.byte_ranks": 0, "data.sentencepieces": 0, "data.subwords": 1,
    "data.token_files": 0, "data.packing": 1, "data.prepare": 12,
    "data.pairs": 1, "data.buckets": 1, "data.trained": 2, "data.token_bytes": 2,
    "data.vocabularies": 2, "data.vocabulary_files": 3, "data.chat": 2, "data.chat_template": -3,
    "stacked": 0, "processes": 0, "memory": 0,
    "presets": 2, "run_presets": 3, "run_dir": 2, "lora": 2, "cache": 1, "parallel": 2, "checkpoint": 2, "integrity": 0,
    "saver": 3,
    "training.optim": 2, "modules.linear": 1, "modules.mlp": 2, "modules.norms": 2, "modules.positions": 2,
    "command_line": 4,
    "modules.moe": 3, "modules.attention": 3, "modules.embed": 3,
    "modules.block": 4,
    "models": 5,
    "decoding.prompts": 6, "decoding.generate": 7, "training.step": 6, "decoding.beam_rules": 0, "decoding.beam": 8,
    "decoding.stream": 8, "decoding.scoring": 8, "decoding.speculative": 8, "decoding.engine": 8,
    "decoding.session": 9,
    "training.peaks": 0, "training.report": 7,
    "complexity.leaves": 6, "complexity.activations": 0, "complexity.train_flops": 7, "complexity.costs": 8,
    "complexity.table": 9, "complexity.measure": 11, "complexity.__main__": 12,
    "evaluation": 11, "sentences": 7, "translate": 9, "inspect.architecture": 6, "inspect.journeys": 7,
    "inspect.look": 6, "inspect.page": 0, "inspect.plots": 10, "inspect": 11, "inspect.__main__": 11,
    "convert.layouts": 0, "convert.gguf": 1, "convert.fields": 1, "convert.mapping": 6, "convert.family": 7,
    "convert.decoders": 8, "convert.encoders": 8, "convert.gguf_models": 8, "convert.pretrained": 9,
    "convert.sources": 10, "convert.__main__": 11, "training.start": 11, "training.samples": 11, "writing": 11,
    "sample_args": 2, "run_list": 3, "translate_lines": 12,
    "batch_output": 3, "batch_input": 12, "batch_job": 13, "training.tasks": 12, "training.loop": 14,
    "training.resume": 13, "training.plan": 15, "training.stopping": 0, "training.writers": 6,
    "": 12,  # the public surface
}  # fmt: skip
PURE = ["training.losses", "decoding.rules", "decoding.automaton", *(name for name in RANKS if name.startswith("ops."))]
SOURCES = {  # by name; an empty __init__.py is no module
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stat().st_size
}


def imports(name):
    """The full names of what a module imports, wherever in its text."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:  # `from tx_jax.ops import positions` is a module, `… import Mask` is not
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("tx_jax.") in RANKS else node.module


def own_imports(name):
    found = {other for other in imports(name) if other.split(".")[0] == "tx_jax"}
    return {other.removeprefix("tx_jax").removeprefix(".") for other in found}


def test_every_module_has_a_rank():
    assert set(SOURCES) == set(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_imports_go_down(name):
    upwards = {other: RANKS[other] for other in own_imports(name) if RANKS[other] >= RANKS[name]}
    assert not upwards, f"{name} has rank {RANKS[name]}"


@pytest.mark.parametrize("name", PURE)
def test_arrays_in_arrays_out(name):
    assert own_imports(name) <= {"errors", "ops.int8", "ops.kernels", "ops.masks", "ops.spread"}


@pytest.mark.parametrize("name", RANKS)
def test_no_reference_implementation_in_the_package(name):
    assert not {other.split(".")[0] for other in imports(name)} & {"torch", "transformers", "tensorflow"}


@pytest.mark.parametrize("name", ["parallel", "checkpoint"])
def test_launchers_and_checkpoints_see_no_model(name):
    assert own_imports(name) <= {"config", "config_checks", "config_json", "errors", "integrity", "run_config"}


def test_the_program_that_renders_a_template_imports_nothing_heavy():
    own = {"jinja2", *sys.stdlib_module_names}
    assert {other.split(".")[0] for other in imports("data.chat_template")} <= own


def test_import_is_quick():
    heavy = {"orbax", "grain", "tyro", "matplotlib", "torch", "transformers", "gguf"}  # Flax brings rich
    code = f"import sys, tx_jax; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=100
    )
    assert done.stdout == "\n"
