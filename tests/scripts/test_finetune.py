"""train.py on a model that is there already, whole or by adapters, and on a tokenizer of its own text."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.checkpoint import CheckpointError, restore_base, restore_params
from tx_jax.convert.pretrained import save_pretrained
from tx_jax.convert.sources import find_source, load_pretrained, load_tokenizer
from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.run_dir import read_config

END = "<|endoftext|>"
MODEL = tx.ModelConfig(
    vocab_size=272, max_len=48, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_mlp=24, mlp="swiglu", norm="rmsnorm"
)
FINETUNE = """finetune --model.dropout-rate 0.3 --data.seq-len 16 --data.batch-size 8 --optim.peak-lr 1e-2
    --optim.warmup-steps 2 --train.n-steps 20 --train.log-every 1 --train.eval-every 20 --train.sample-every 20
    --train.save-every 10 --train.sample-tokens 20"""
LORA = "--lora.rank 2 --lora.alpha 6 --lora.targets kernel$ --optim.peak-lr 3e-2"
BPE = """gpt-shakespeare --data.tokenizer bpe --data.vocab-size 262 --data.seq-len 8 --data.batch-size 8
    --model.n-layers 1 --model.d-model 16 --model.n-heads 2 --optim.warmup-steps 1 --train.n-steps 2
    --train.eval-every 0 --train.sample-every 0"""


@pytest.fixture(scope="module")
def book(text, tmp_path_factory):
    """A text in which a special token is typed."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(f"{text.read_text()}{END}\n")
    return path


@pytest.fixture(scope="module")
def public(book, tmp_path_factory):
    """A directory as models are published: random weights, and a tokenizer with a special token."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("models") / "public"
    learnt = tokenizers.Tokenizer.from_str(SubwordTokenizer.train(book.read_text(), 264).json)
    learnt.add_special_tokens([END])
    tokenizer = SubwordTokenizer(learnt.to_str(), eos_ids=(learnt.token_to_id(END),))
    assert tokenizer.vocab_size < 272  # the table has rows without text
    params = tx.init_params(tx.build(MODEL), jax.random.key(1))
    save_pretrained(path, MODEL, params, special_ids={"eos_token_id": tokenizer.eos_ids[0]})
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def command(book, public):
    return [*FINETUNE.split(), "--data.path", str(book), "--init", str(public)]


@pytest.fixture(scope="module")
def tuned(train, command, tmp_path_factory):
    """A finished run, and one with adapters."""
    home = tmp_path_factory.mktemp("tuned")
    for name, more in {"all": "", "lora": LORA}.items():
        train([*command, *more.split(), "--run-dir", str(home / name)])
    return home


def losses(run_dir):
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("name", ["all", "lora"])
def test_a_run_is_whole_without_what_it_began_with(tuned, public, book, name):
    run = read_config(tuned / name)
    assert run.model == dataclasses.replace(load_pretrained(public).cfg, dropout_rate=0.3)
    assert run.init == str(public)
    assert np.mean(losses(tuned / name)[-3:]) < losses(tuned / name)[0] - 0.03
    source, tokenizer = load_pretrained(tuned / name), load_tokenizer(public)
    assert load_tokenizer(tuned / name) == tokenizer
    assert (source.cfg, source.special_ids, source.architecture) == (run.model, {}, None)
    assert tokenizer.eos_ids[0] not in tokenizer.encode(book.read_text())
    assert (tuned / name / "samples.txt").read_text().startswith("=== step 20\n\n")


@pytest.mark.parametrize("name", ["all", "lora"])
def test_going_on_needs_the_run_directory_alone_and_is_bit_exact(tuned, train, command, public, tmp_path, name):
    again = tmp_path / "again"
    shutil.copytree(tuned / name, again)
    shutil.rmtree(again / "checkpoints" / "20")
    public.rename(hidden := public.with_name("hidden"))
    try:
        train([str(tuned / name / "config.json"), "--run-dir", str(again)])
    finally:
        hidden.rename(public)
    assert_same(load_pretrained(again).params, load_pretrained(tuned / name).params)


@pytest.mark.parametrize("more", ["", LORA])
def test_a_mesh_begins_with_the_same_weights(train, command, tmp_path, more):
    found, brief = [], "--model.dropout-rate 0 --train.n-steps 3 --train.eval-every 0 --train.sample-every 0"
    for mesh in ("", "--mesh.fsdp 4 --mesh.tensor 2"):
        run = tmp_path / f"run {mesh}"
        train([*command, *brief.split(), *more.split(), *mesh.split(), "--run-dir", str(run)])
        found.append((losses(run), load_pretrained(run).params))
    np.testing.assert_allclose(*(loss for loss, _ in found), rtol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), *(tree for _, tree in found))


def test_adapters_without_their_base(tuned, tmp_path):
    shutil.copytree(tuned / "lora", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "base")
    with pytest.raises(CheckpointError, match="/base' holds no checkpoint; bring it back: the adapters are nothing"):
        load_pretrained(tmp_path / "run")


def test_adapters_beside_the_base_are_the_merged_model(tuned, public, tmp_path):
    run, base = tuned / "lora", load_pretrained(public).params
    assert_same(restore_base(run, base), base)
    lora = restore_params(run, tx.init_lora(base, jax.random.key(0), 2, "kernel$"))
    assert sum(x.size for x in jax.tree.leaves(lora)) == 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24))
    merged = tx.merge_lora(base, lora, 6.0)
    assert_same(load_pretrained(run).params, merged)
    a, b = (np.asarray(part) for part in lora["stack"]["blocks_0"]["mlp"]["down"]["kernel"])
    kernel, after = (tree["stack"]["blocks_0"]["mlp"]["down"]["kernel"] for tree in (base, merged))
    np.testing.assert_allclose(after, kernel + 3 * b @ a, rtol=1e-5, atol=1e-6)
    assert not np.allclose(after, kernel)
    save_pretrained(tmp_path / "export", MODEL, merged)
    assert_same(load_pretrained(tmp_path / "export").params, merged)
    mesh = tx.make_mesh(tx.MeshConfig(fsdp=4, tensor=2))
    half = load_pretrained(run, dtype="bfloat16", mesh=mesh, step=20).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    assert half["stack"]["blocks_0"]["mlp"]["down"]["kernel"].sharding.shard_shape((16, 24)) == (4, 12)
    assert_same(half, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), merged))


def test_the_pattern_in_a_run_of_anyone_is_not_run(tuned, tmp_path):
    shutil.copytree(tuned / "lora", tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"kernel$"', '"^([a-z/_0-9]+)+!$"'))
    assert_same(load_pretrained(tmp_path / "run").params, load_pretrained(tuned / "lora").params)


REFUSED = {  # flags after those of the run: what the message says
    "--run-dir {tuned}/all --init {tuned}/lora": "holds a run with init='{public}', not '{tuned}/lora'; use another",
    "--run-dir {tuned}/all --lora.rank 2": "holds a run with lora.rank=0, not 2; use another --run-dir",
    "--run-dir {new} --model.n-layers 3": "--model.n-layers cannot be chosen with --init {public}, which brings its",
    "--run-dir {new} --data.tokenizer byte": "--data.tokenizer cannot be chosen with --init {public}, which brings its",
    "--run-dir {new} --data.seq-len 49": "data.seq_len=49 exceeds the 48 tokens of {public}; shorten it",
    "--run-dir {new} --lora.rank 2 --lora.targets c_attn": "targets='c_attn' matches no parameter; there are stack/",
    "--run-dir {new} --init nothing": "model 'nothing' does not exist; give a name (smollm2, minilm), a directory in",
    "--run-dir {new} --init {blind}": "init='{blind}' is an encoder, which does not go on from text; give a decoder",
    "--run-dir {new} --init {mute}": "{mute} holds no tokenizer; give a model with one of tokenizer.json",
    "--run-dir {new} --init {short}": "init='{short}' has a tokenizer of 265 ids for 50 vectors; they are of two",
}  # fmt: skip


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(train, tuned, public, command, tmp_path, capsys, flags):
    names = {"tuned": tuned, "public": public, "new": tmp_path / "new", "mute": tmp_path / "mute"}
    names["short"] = tmp_path / "short"
    for name, size in {"mute": 272, "short": 50}.items():
        cfg = dataclasses.replace(MODEL, vocab_size=size)
        save_pretrained(names[name], cfg, tx.init_params(tx.build(cfg), jax.random.key(1)))
    load_tokenizer(public).save(names["short"])
    names["blind"] = tmp_path / "blind"
    cfg = dataclasses.replace(tx.presets.bert_base(), vocab_size=272, d_model=16, n_layers=1, n_heads=2)
    save_pretrained(names["blind"], cfg, tx.init_params(tx.build(cfg), jax.random.key(1)))
    load_tokenizer(public).save(names["blind"])
    with pytest.raises(SystemExit, match="2"):
        train([*command, *flags.format(**names).split()])
    assert REFUSED[flags].format(**names) in capsys.readouterr().err
    assert not names["new"].exists()


def test_sources_that_are_not_there(public, tuned, monkeypatch, tmp_path):
    with pytest.raises(tx.InputError, match=r"is of a run directory of train.py, and .*/public is none"):
        load_pretrained(public, step=3)
    with pytest.raises(tx.InputError, match="dtype='int8' is not one of float32"):
        load_pretrained(public, dtype="int8")
    with pytest.raises(tx.InputError, match="holds no tokenizer; give a model with one of"):
        load_tokenizer(tmp_path)
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def snapshot_download(*args, **how):
        asked.append((args, how["revision"], how["allow_patterns"][0]))
        if how["revision"]:
            raise OSError("no network\nat all")
        return str(public)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert find_source("hf://org/name") == public
    with pytest.raises(tx.InputError, match=r"cannot fetch hf://org/name \(no network\); check its name and the"):
        find_source("hf://org/name@v1")
    assert asked == [(("org/name",), None, "model*.safetensors"), (("org/name",), "v1", "model*.safetensors")]


def test_a_tokenizer_of_the_text(train, book, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    run = tmp_path / "run"
    small = [*BPE.split(), "--data.path", str(book), "--run-dir", str(run)]
    train(small)
    assert read_config(run).model.vocab_size == 262
    tokenizer = load_tokenizer(run)
    assert tokenizer == SubwordTokenizer.train(book.read_text(), 262)
    assert tokenizer.decode(tokenizer.encode(f"the né{END}")) == f"the né{END}"
    train(small)
    assert "continuing after step 2 of 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        train([*small, "--data.vocab-size", "258"])
    assert "holds a run with another tokenizer" in capsys.readouterr().err
