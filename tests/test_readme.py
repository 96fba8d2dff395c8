"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    space: dict = {}
    exec("\n".join(blocks), space)
    assert space["out"].tokens.shape == (2, 8)
    assert space["best"].tokens.shape == (2, 2, 8)
    assert int(space["state"].step) == 1
    assert space["seen"].attention.shape == (2, 2, 4, 3, 3)
    assert space["found"].architecture == "LlamaForCausalLM"
