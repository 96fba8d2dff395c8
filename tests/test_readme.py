"""The README's Python runs as it stands, with small models for those that it trains or fetches; its commands parse."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import jax
import pytest

import tx_jax as tx
from tx_jax.command_line import parse, parse_run
from tx_jax.complexity import __main__ as complexity
from tx_jax.convert import __main__ as convert
from tx_jax.data import prepare
from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.run_presets import RUNS
from tx_jax.sample_args import Args

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
SCRIPTS = {  # by the words before its arguments: what takes them
    "python sample.py": Args,
    "python -m tx_jax.complexity": complexity.Args,
    "python -m tx_jax.convert": convert.Args,
    "python -m tx_jax.data.prepare": prepare.Args,
}
OF_PROCESSES = re.compile(r" (--coordinator|--n-processes|--process-id) \S+| --dry-run")  # taken out before the rest
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]


def words(command):
    """Without settings of the environment, comments, and what stands for more."""
    return shlex.split(re.sub(r"^(\w+=\S+ )+", "", command.replace("…", "")), comments=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    match words(OF_PROCESSES.sub("", command)):
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case ["source", path]:
            assert path == ".venv/bin/activate"
        case ["pip", "install", "-e", extras]:
            assert set(extras.strip(".[]").split(",")) <= set(EXTRAS)
        case ["python", "train.py"] | ["python", "sample.py"]:  # they list what there is
            pass
        case ["python", "train.py", preset, "--help"]:
            assert preset in RUNS
        case ["python", "train.py", preset, *flags]:
            parse_run([preset.replace("PRESET", "gpt-shakespeare"), *flags])
        case [*program]:
            name = next(name for name in SCRIPTS if shlex.join(program).startswith(name))
            parse(SCRIPTS[name], program[len(name.split()) :], prog=name)


def test_the_table_is_what_is_printed(capsys):
    complexity.main(["gpt2-small", "--seq-len", "1024", "--device", "TPU v5e"])
    (table,) = re.findall(r"```\n(FLOPs .*?)```", README, re.DOTALL)
    assert table in capsys.readouterr().out


def small(cfg, **changes):
    """A model of random weights, as `load_pretrained` gives it."""
    cfg = dataclasses.replace(cfg, vocab_size=280, d_head=16, n_heads=2, n_layers=1, d_mlp=32, **changes)
    return tx.Pretrained(cfg, tx.init_params(tx.build(cfg), jax.random.key(0)), {}, None)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load, tokenizer = tx.load_pretrained, SubwordTokenizer.train("how are you? a kitten " * 9, 280, ("<s>", "</s>"))
    models = {
        "runs/es": small(tx.presets.vaswani_base(), d_model=32),
        "minilm": small(tx.presets.bert_base(), d_model=384),
    }
    monkeypatch.setattr(tx, "load_pretrained", lambda name, **more: models.get(name) or load(name, **more))
    monkeypatch.setattr(tx, "load_tokenizer", lambda name: tokenizer)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 10
    space: dict = {}
    exec("\n".join(blocks), space)
    assert space["out"].tokens.shape == (2, 8)
    assert space["best"].tokens.shape == (2, 2, 8)
    assert int(space["state"].step) == 1
    assert space["seen"].attention.shape == (2, 2, 4, 3, 3)
    assert "LlamaForCausalLM" in (tmp_path / "exported" / "config.json").read_text()
    assert [len(texts) for texts in space["told"]] == [3]
    assert space["vectors"].shape == (3, 384)
