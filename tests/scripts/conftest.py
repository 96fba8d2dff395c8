"""train.py and sample.py as functions, and one small run and one public model that all tests of them share."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import tx_jax as tx
from tx_jax import batch_job
from tx_jax.data.subwords import SubwordTokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
TEXT = "the cat sat on a mat and slept. " * 9
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "slept.", ""]
TINY = """gpt-shakespeare
    --model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.max-len 64 --model.window 16
    --model.dropout-rate 0.3 --data.seq-len 16 --data.batch-size 8 --optim.peak-lr 1e-2 --optim.warmup-steps 2
    --train.n-steps 40 --train.log-every 5 --train.eval-every 20 --train.save-every 20 --train.sample-tokens 9"""


def _main(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@contextlib.contextmanager
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's caches; each program is compiled once for all tests."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TX_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv(names[1].upper(), "0")  # for child processes
        jax.config.update(names[1], 0)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with _own_cache(tmp_path_factory):
        yield


@pytest.fixture(scope="session")
def train():
    return _main("train")


@pytest.fixture(scope="session")
def sample():
    return _main("sample")


@pytest.fixture(scope="session")
def child():
    """A script as a process of its own."""

    def start(name, *args):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, ROOT / name, *map(str, args)], env=env, text=True, **pipes)

    return start


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 400 words: 15 characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 400)) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(text):
    """The command line of a small run, with dropout; --run-dir is to be added."""
    return [*TINY.split(), "--data.path", str(text)]


@pytest.fixture(scope="session")
def run(train, tiny, tmp_path_factory):
    """The directory of that run when it is done."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    with _own_cache(tmp_path_factory):
        train([*tiny, "--run-dir", str(run_dir)])
    return run_dir


@pytest.fixture(scope="session")
def public(tmp_path_factory):
    """A directory in Hugging Face's layout, of a model with large logits, that chats."""
    directory = tmp_path_factory.mktemp("public") / "tiny"
    tokenizer = SubwordTokenizer.train(TEXT, 300)
    vocabulary = json.loads(tokenizer.json)
    special = {"id": tokenizer.vocab_size, "content": "<s>", "special": True}
    vocabulary["added_tokens"] = [special | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)]
    tokenizer = SubwordTokenizer(json.dumps(vocabulary), special["id"], (special["id"],), TEMPLATE)
    cfg = tx.ModelConfig(
        vocab_size=tokenizer.vocab_size, max_len=400, d_model=24, n_layers=2, n_heads=4, mlp="swiglu", norm="rmsnorm"
    )
    params = tx.init_params(tx.build(cfg), jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf, params)
    ids = {"bos_token_id": special["id"], "eos_token_id": special["id"]}
    tx.save_pretrained(directory, cfg, params, special_ids=ids)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file of 20 prompts for that run, two thirds of them with a number of new tokens."""
    rng, path = np.random.default_rng(3), tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": i, "prompt": TEXT[: rng.integers(1, 30)]} for i in range(20)]
    rows = [row | ({"max_new_tokens": int(rng.integers(1, 30))} if row["id"] % 3 else {}) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def job(run, sample, prompts, tmp_path, capsys, monkeypatch):
    """Does a job, and gives what it says; `refuses` has it fail, and gives why."""
    monkeypatch.setattr(batch_job, "ROUNDS", 3)  # calls of 12 prompts: the job has several

    def do(*flags, model=run, output=tmp_path / "out.jsonl", input=prompts):
        capsys.readouterr()
        sample([str(arg) for arg in (model, "--input", input, "--output", output, "--batch-size", 4, *flags)])
        out, err = capsys.readouterr()
        assert out == ""
        return err

    def refuses(*flags, **more):
        with pytest.raises(SystemExit, match="2"):
            do(*flags, **more)
        return capsys.readouterr().err.removeprefix("error: ").removesuffix("\n")

    do.refuses = refuses
    return do
