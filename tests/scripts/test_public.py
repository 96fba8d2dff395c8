"""A public model, tiny and random, in the scripts: sample.py converses with it, convert takes it both ways."""

import io
import json
import shutil
import sys

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.convert.__main__ import main as convert
from tx_jax.convert.files import open_safetensors
from tx_jax.convert.sources import load_pretrained, load_tokenizer
from tx_jax.data import subwords


@pytest.fixture
def write(sample, capsys):
    def written(*args):
        capsys.readouterr()
        sample([str(arg) for arg in args])
        return capsys.readouterr().out

    return written


def test_a_model_that_chats_answers(public, write):
    flags = ["--temperature", 0, "--max-new-tokens", 20]
    answer = write(public, "--prompt", "the cat", *flags)
    assert "the cat" not in answer
    assert write(public, "--prompt", "<s>user: the cat\n<s>", "--raw", *flags) != answer
    assert write(public, "--prompt", "the cat", "--system", "be brief", *flags) != answer
    assert write(public, "--prompt", "the", "--raw", *flags, "--num-samples", 2).count("--- sample") == 2


def test_a_conversation_is_its_turns_read_at_once(public, write, monkeypatch):
    flags = ["--temperature", 0, "--max-new-tokens", 20]
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\nsat on\n"))
    spoken = write(public, "--interactive", *flags)
    first = write(public, "--prompt", "the cat", *flags)
    assert spoken.startswith(first)
    model, tokenizer = load_pretrained(public), load_tokenizer(public)
    # The same second turn, by one pass over the whole conversation, whose first answer is said again as text.
    text = f"<s>user: the cat\n<s>assistant: {first[:-1]}\n<s>user: sat on\n<s>"
    ids = tokenizer.encode(text, special=True)
    out = tx.generate(tx.build(model.cfg), model.params, ids[None], max_new_tokens=20, eos_id=tokenizer.eos_ids)
    assert spoken.removeprefix(first) == tokenizer.decode(np.asarray(out.tokens[0, : out.lengths[0]])) + "\n"


def test_an_answer_is_json_of_the_schema(public, write, monkeypatch, tmp_path):
    """From a file or as it stands, in one go or as it comes; and so is each answer of a conversation."""
    pytest.importorskip("outlines_core")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x"]}}, "required": ["a", "b"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    flags = ["--max-new-tokens", 60, "--json-schema"]
    streamed = write(public, "--prompt", "the cat", *flags, tmp_path / "schema.json")
    assert json.loads(streamed)["b"] == "x"
    assert write(public, "--prompt", "the cat", *flags, json.dumps(schema)) == streamed
    several = write(public, "--prompt", "the cat", "--num-samples", 2, "--temperature", 0, *flags, json.dumps(schema))
    assert several.split("\n")[1] + "\n" == streamed
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nsat on\n"))
    answers = write(public, "--interactive", *flags, f"@{tmp_path / 'schema.json'}").splitlines()
    assert answers[0] + "\n" == streamed
    assert [{*json.loads(answer)} for answer in answers] == [{"a", "b"}] * 2


def test_a_long_conversation_forgets_its_oldest_turns(public, write, monkeypatch, capsys):
    lines = ["the cat sat on a mat and slept. " * 8] * 6 + ["cat " * 900, "the cat"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n" + "\n".join(lines).encode())))
    spoken = write(public, "--interactive", "--temperature", 0, "--max-new-tokens", 30)
    assert spoken.count("\n") >= 8


def test_the_round_trip_over_a_run_directory_is_exact(public, tmp_path, write, capsys):
    convert([str(public), str(tmp_path / "run")])
    convert([str(tmp_path / "run"), str(tmp_path / "back")])
    assert capsys.readouterr().out.count("parameters, written as") == 2
    files = [dict(open_safetensors(path).read()) for path in (public, tmp_path / "back")]
    jax.tree.map(np.testing.assert_array_equal, *files)
    assert load_tokenizer(tmp_path / "back") == load_tokenizer(public)
    flags = ["--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 9]
    assert write(tmp_path / "run", *flags) == write(public, *flags) == write(tmp_path / "back", *flags)


def test_without_the_package_of_tokenizers_nothing_is_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    subwords._built.cache_clear()  # another test may have built the same
    with pytest.raises(SystemExit, match="2"):
        convert([str(run), str(tmp_path / "new")])
    assert "needs the package tokenizers; pip install" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_converted_leaves_nothing_behind(public, tmp_path, capsys):
    shutil.copytree(public, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for to in ("run", "hugging_face"):
        with pytest.raises(SystemExit, match="2"):
            convert([str(tmp_path / "cut"), str(tmp_path / "new"), "--to", to])
        assert not (tmp_path / "new").exists()


def test_a_run_of_train_py_is_exported_with_its_tokenizer(run, tmp_path, capsys):
    convert([str(run), str(tmp_path / "out"), "--dtype", "bfloat16"])
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    found = load_pretrained(tmp_path / "out", dtype=None)
    assert found.architecture == "Starcoder2ForCausalLM"  # layer norms, a window, no gate; biases of zero
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.params)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("{public} {public}", "dst='{public}' is there already; name a new directory"),
        ("{public} {new} --dtype bfloat16", "dtype='bfloat16': a run directory holds float32; leave it out, or"),
        (
            "{public} {new} --architecture LlamaForCausalLM",
            "architecture='LlamaForCausalLM' is of transformers, not of",
        ),
        (
            "{public} {new} --to hugging_face --architecture GPT2LMHeadModel",
            "='GPT2LMHeadModel' cannot hold this model",
        ),
        ("{public} {new} --to hugging_face --architecture Nope", "architecture='Nope' is not one of GPT2LMHeadModel"),
        ("{new} {new}", "model '{new}' does not exist; give a name"),
    ],
)
def test_convert_refuses(public, tmp_path, capsys, flags, says):
    names = {"public": public, "new": tmp_path / "new"}
    with pytest.raises(SystemExit) as end:
        convert(flags.format(**names).split())
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert says.format(**names) in err
    assert not (tmp_path / "new").exists()
