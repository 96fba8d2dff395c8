"""The README's Python runs as it stands, with small models for those that it trains or fetches."""

import dataclasses
import re
from pathlib import Path

import jax

import tx_jax as tx
from tx_jax.data.subwords import SubwordTokenizer

README = Path(__file__).parent.parent / "README.md"


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
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
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
