"""Token files and packed documents: nothing is lost or seen twice, they resume, and a fault is refused."""

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tx_jax as tx
from tx_jax import InputError
from tx_jax.data import packing, prepare
from tx_jax.data.packing import cut, held_out_batches, pack, packed_batches, split_documents
from tx_jax.data.token_files import begin_token_files, open_token_files, write_token_files
from tx_jax.data.vocabulary_files import find_tokenizer

V, T, B = 300, 16, 4
LENGTHS = [5, 2, 40, 17, 16, 1, 9, 9, 33, 3, 12, 30]


def documents(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, V, n), 3 * n) for n in lengths]


def write(home, documents, vocab_size, source, shard=10**6):
    index = begin_token_files(home, source)
    return write_token_files(home, index, lambda first: documents[first:], vocab_size, shard)


@pytest.fixture(autouse=True, scope="module")
def blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", 64)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokens")
    write(home, documents(), V, {}, shard=30)
    return open_token_files(home)


def take(n, files, own=None, seed=0, more=()):
    sources = [(cut(part, T), cut(part, T).n, share) for part, share in ((files, 1.0), *more)]
    return list(itertools.islice(packed_batches(sources, batch_size=B, seed=seed, own=own), n))


def runs(batch):
    """(positions, tokens, targets) of each packed document in a batch."""
    for b, segments in enumerate(batch.segments):
        for number in np.unique(segments):
            here = (segments == number) & (batch.weights[b] > 0)
            if here.any():
                yield batch.positions[b, here], batch.tokens[b, here], batch.targets[b, here]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 13), max_size=40))
def test_a_pack_holds_each_once_and_no_row_overflows(lengths):
    rows = pack(lengths, room=13)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 13 for row in rows)
    assert len(rows) <= 2 * sum(lengths) / 13 + 1  # no two rows are half empty


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(1, 1025, 4096).tolist()
    assert sum(lengths) / (1024 * len(pack(lengths, 1024))) > 0.98


@pytest.mark.parametrize("shard", [1, 30, 10**6])
def test_documents_come_back(shard, tmp_path):
    write(tmp_path, documents(), V, {}, shard)
    files = open_token_files(tmp_path)
    assert files.lengths.tolist() == [[n, 3 * n] for n in LENGTHS]
    pieces, found = cut(files, T), []
    for number, (ids, _) in enumerate(documents()):
        mine = [i for i in range(pieces.n) if pieces.place(i)[0] == number]
        np.testing.assert_array_equal(np.concatenate([pieces.read(i)[:-1] for i in mine] or [ids[:0]]), ids[:-1])
        np.testing.assert_array_equal(np.concatenate([pieces.read(i)[1:] for i in mine] or [ids[:0]]), ids[1:])
        found += mine
    assert found == list(range(pieces.n))
    assert pieces.of_documents(len(LENGTHS)) == pieces.n
    assert pieces.of_documents(3) == 1 + 1 + 3


def test_all_that_is_held_out_is_a_target_once(files):
    pieces, n = cut(files, T), split_documents(files, 0.5)
    assert n == 6  # of 177 tokens, 81
    batches = held_out_batches([(pieces, pieces.of_documents(n))], batch_size=B)
    found = sorted(tuple(targets) for i in range(len(batches)) for _, _, targets in runs(batches[i]))
    expected = [tuple(ids[1:][at : at + T]) for ids, _ in documents()[n:] for at in range(0, len(ids) - 1, T)]
    assert found == sorted(expected)
    assert all(len(batches[i].tokens) == B for i in range(len(batches)))


def test_training_sees_each_piece_once_an_epoch(files, monkeypatch):
    n = cut(files, T).n
    assert n % 3 == 0
    monkeypatch.setattr(packing, "BLOCK", n // 3)
    rows = [run for batch in take(20, files) for run in runs(batch)]
    pieces = [tuple(tokens) for _, tokens, _ in rows]
    first, second = pieces[:n], pieces[n : 2 * n]
    assert sorted(first) == sorted(second) == sorted(tuple(cut(files, T).read(i)[:-1]) for i in range(n))
    assert sorted(first[: n // 3]) != sorted(second[: n // 3])  # each epoch has an order of its own
    for positions, tokens, targets in rows:
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
    assert [b.tokens.tolist() for b in take(2, files)] != [b.tokens.tolist() for b in take(2, files, seed=1)]


@settings(deadline=None, max_examples=10)
@given(n_before=st.integers(0, 9))
def test_training_resumes_at_the_very_batch(files, n_before):
    sources = [(cut(files, T), cut(files, T).n, 1.0)]
    dataset = packed_batches(sources, batch_size=B, seed=3)
    iterator = iter(dataset)
    for _ in range(n_before):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest, resumed = [next(iterator) for _ in range(4)], iter(dataset)
    next(resumed)
    resumed.set_state(state)
    for batch in rest:
        jax.tree.map(np.testing.assert_array_equal, batch, next(resumed))


def test_a_process_reads_its_own_rows_of_the_same_batches(files, monkeypatch):
    whole, parts, read, function = take(5, files), [], [], packing.Pieces.read

    def counted(pieces, i):
        read.append(i)
        return function(pieces, i)

    monkeypatch.setattr(packing.Pieces, "read", counted)
    for own in (np.array([True, True, False, False]), np.array([False, False, True, True])):
        parts.append((own, take(5, files, own)))
    assert len(read) == sum(len(list(runs(batch))) for batch in whole)
    for own, part in parts:
        for batch, mine in zip(whole, part, strict=True):
            np.testing.assert_array_equal(batch.tokens[own], mine.tokens[own])
            np.testing.assert_array_equal(batch.targets[own], mine.targets[own])
            assert not mine.tokens[~own].any()
            for name in ("positions", "segments", "weights"):
                np.testing.assert_array_equal(getattr(batch, name), getattr(mine, name))


def test_a_mixture_has_its_shares_of_the_tokens(files, tmp_path):
    other = tmp_path / "other"
    write(other, [(ids + V, n) for ids, n in documents([3] * 40)], 2 * V, {})
    batches = take(200, files, more=[(open_token_files(other), 3.0)])
    tokens = np.concatenate([batch.tokens[batch.weights > 0] for batch in batches])
    assert (tokens >= V).mean() == pytest.approx(0.75, abs=0.02)


def test_packed_documents_are_the_documents_alone(files):
    """Law 6, for the loss and its gradient."""
    cfg = tx.ModelConfig(vocab_size=V, d_model=16, n_layers=2, n_heads=2, max_len=T, positions="learned")
    model = tx.build(cfg)
    params = tx.init_params(model, jax.random.key(0))
    (batch,) = take(1, files)
    found = list(runs(batch))
    shape = len(found), T
    alone = tx.Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    for i, (positions, tokens, targets) in enumerate(found):
        n = len(positions)
        alone.tokens[i, :n], alone.targets[i, :n], alone.weights[i, :n] = tokens, targets, 1
    loss = jax.jit(jax.value_and_grad(lambda params, batch: tx.make_eval_step(model)(params, batch)[0]))
    one, other = loss(params, batch), loss(params, alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), one, other)


def test_files_that_are_cut_changed_or_gone_are_refused(tmp_path):
    write(tmp_path, documents(), V, {}, shard=30)
    path = tmp_path / "00001.tokens"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"00001.tokens has \d+ bytes, not \d+: it was cut; run python -m tx"):
        open_token_files(tmp_path)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(InputError, match=r"00001.tokens has SHA-256 \w{8}…, not \w{8}…: it was changed; run"):
        open_token_files(tmp_path)
    write(tmp_path, documents(), V, {}, shard=30)  # mends it
    assert path.read_bytes() == content
    assert open_token_files(tmp_path).lengths.tolist() == [[n, 3 * n] for n in LENGTHS]
    path.unlink()
    with pytest.raises(InputError, match=r"00001.tokens is not there; run .*, which mends it, or bring the file back$"):
        open_token_files(tmp_path)
    with pytest.raises(InputError, match=r"holds no index.json; make it by python -m tx_jax.data.prepare$"):
        open_token_files(tmp_path / "nothing")


def test_documents_that_will_not_do(tmp_path):
    with pytest.raises(InputError, match=r"^path='x' holds no document; there is nothing to train on$"):
        write(tmp_path / "none", [], V, {"path": "x"})
    write(one := tmp_path / "one", documents([1]), V, {})
    with pytest.raises(InputError, match=r"holds no document of two tokens; there is nothing to predict$"):
        cut(open_token_files(one), T)
    with pytest.raises(InputError, match=r"^seq_len=0 must be at least 1 token$"):
        cut(open_token_files(one), 0)
    with pytest.raises(InputError, match=r"holds 1 document, which cannot be both trained on and held .*separator$"):
        split_documents(open_token_files(one), 0.1)
    with pytest.raises(InputError, match=r"holds token files of a=None, not 1; use another directory, or delete it$"):
        write(one, documents(), V, {"a": 1})


@pytest.fixture
def texts(tmp_path):
    """Texts of each kind, 3 documents."""
    (home := tmp_path / "texts").mkdir()
    (home / "a.txt").write_text("one\ntwo\n")
    (home / "b.jsonl").write_text(json.dumps({"text": "three é"}) + "\n" + json.dumps({"text": "four"}) + "\n")
    return home


def test_prepare_says_what_it_made_and_is_done(texts, tmp_path, capsys):
    out = tmp_path / "out"
    args = [str(out), "--path", str(texts), "--tokenizer", "byte"]
    prepare.main(args)
    said = capsys.readouterr().out
    assert "3 documents, 20 tokens of 256, 1 shards" in said
    assert f"python train.py PRESET --data.path {out}" in said
    files = open_token_files(out)
    assert files.lengths.tolist() == [[8, 7], [8, 7], [4, 3]]  # the first byte is given
    assert bytes(files.tokens[0].astype(np.uint8)).decode() == "one\ntwo\nthree éfour"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".tokens", ".ends")}
    prepare.main(args)
    assert capsys.readouterr().out == said
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_line_that_is_the_separator_ends_a_document(tmp_path):
    (path := tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n\nthree\n\n")
    args = prepare.Args(out="", path=str(path), separator="")
    assert list(prepare.read_documents(args, [path])) == ["one\n", "two\nlines\n", "three\n"]


def test_documents_begin_and_end_as_the_tokenizer_says(texts, tmp_path):
    prepare.main([str(tmp_path / "out"), "--path", str(texts), "--vocab-size", "270"])
    files, tokenizer = open_token_files(tmp_path / "out"), find_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer is not None
    assert tokenizer.decode(files.tokens[0], special=True) == "<s>one\ntwo\n</s><s>three é</s><s>four</s>"


def test_another_corpus_takes_the_tokenizer_of_the_first(texts, tmp_path):
    prepare.main([str(one := tmp_path / "one"), "--path", str(texts), "--vocab-size", "270"])
    prepare.main([str(two := tmp_path / "two"), "--path", str(texts / "a.txt"), "--tokenizer", str(one)])
    assert find_tokenizer(one / "tokenizer") == find_tokenizer(two / "tokenizer")
    first = open_token_files(two).tokens[0]
    np.testing.assert_array_equal(first, open_token_files(one).tokens[0][: len(first)])


@pytest.mark.parametrize("kind", ["lines", "saved", "saved splits"])
def test_a_dataset_of_hugging_face(kind, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    (home := tmp_path / "set").mkdir()
    texts = datasets.Dataset.from_dict({"body": ["one", "two"], "number": [1, 2]})
    if kind == "lines":
        texts.to_json(home / "train.jsonl")
    else:
        (texts if kind == "saved" else datasets.DatasetDict(train=texts)).save_to_disk(home)
    args = ["--dataset", str(home), "--tokenizer", "byte"]
    refused = {
        "--field text": "has no field='text', of body, number; name one of them",
        "--field number": "has 1 as 'number', which is no text",
    }
    for flags, says in (refused | ({} if kind == "saved" else {"--field body --split test": "gives no split"})).items():
        with pytest.raises(SystemExit, match="2"):
            prepare.main([str(tmp_path / "out"), *args, *flags.split()])
        assert says in capsys.readouterr().err
    prepare.main([str(tmp_path / "out"), *args, "--field", "body"])  # where nothing was written yet, flags may change
    assert bytes(open_token_files(tmp_path / "out").tokens[0].astype(np.uint8)) == b"onetwo"


def test_what_was_begun_goes_on_with_the_same_flags_and_texts_only(texts, tmp_path, capsys):
    out = tmp_path / "out"
    prepare.main([str(out), "--path", str(texts), "--vocab-size", "270"])
    changed = {"--vocab-size": ("280", "vocab_size=270, not 280"), "--shard-size": ("9", "shard_size=67108864, not 9")}
    for flag, (value, says) in changed.items():
        with pytest.raises(SystemExit, match="2"):
            prepare.main([str(out), "--path", str(texts), "--vocab-size", "270", flag, value])
        assert f"{out} holds token files of {says}; use another directory, or delete it" in capsys.readouterr().err
    (texts / "a.txt").write_text("One\ntwo\n")
    with pytest.raises(SystemExit, match="2"):
        prepare.main([str(out), "--path", str(texts), "--vocab-size", "270"])
    assert "holds token files of sha256='" in capsys.readouterr().err


def test_an_interruption_costs_a_shard(texts, tmp_path, monkeypatch):
    (texts / "c.txt").write_text("x" * 50)
    args = [str(tmp_path / "out"), "--path", str(texts), "--tokenizer", "byte", "--shard-size", "9"]
    prepare.main(args)
    (tmp_path / "out" / "00001.ends").unlink()
    encoded, function = [], prepare.encode_all

    def counted(*args):
        for document in function(*args):
            encoded.append(len(document[0]))
            yield document

    monkeypatch.setattr(prepare, "encode_all", counted)
    prepare.main(args)
    assert encoded == [4, 50]  # not the first two, of 8
    assert open_token_files(tmp_path / "out").lengths[:, 0].tolist() == [8, 8, 4, 50]


def test_a_killed_prepare_goes_on_to_the_same_bytes(tmp_path):
    """SIGKILL at several times; a part of a shard that was written is written anew."""
    rng, texts = np.random.default_rng(0), tmp_path / "texts.jsonl"
    rows = ("".join(map(chr, rng.integers(97, 123, 3000))) for _ in range(3000))
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    args = ["--path", str(texts), "--tokenizer", "byte", "--shard-size", "100000"]
    prepare.main([str(whole := tmp_path / "whole"), *args])
    killed, halfway = tmp_path / "killed", []
    for _ in range(20):
        command = [sys.executable, "-m", "tx_jax.data.prepare", str(killed), *args]
        process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
        begun, before = time.monotonic(), len(list(killed.glob("*.tokens")))
        while process.poll() is None and len(list(killed.glob("*.tokens"))) < before + 25:
            assert time.monotonic() < begun + 120
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        halfway.append(len(list(killed.glob("*.tokens"))))
    assert halfway
    assert process.returncode == 0
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(killed) for path in killed.rglob("*") if path.is_file())
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("RUN --path TEXTS", r"^error: out='.*' holds other files; use another directory$"),
        ("OUT", r"^error: path=None and dataset=None: give one of them$"),
        ("OUT --path nowhere", r"^error: path='nowhere' is none of \*.txt, \*.jsonl, \*.jsonl.gz, nor a dir"),
        ("OUT --path TEXTS --shard-size 0", r"^error: shard_size=0 must be at least 1 token$"),
        ("TEXTS --path TEXTS", r"^error: out='.*' holds other files; use another directory$"),
        ("OUT --path TEXTS --field body", r"b.jsonl, line 1 has no text as 'body', of text; name another --field$"),
        ("OUT --path TEXTS/number.jsonl", r"number.jsonl, line 1 has no text as 'text', of text; name another"),
        ("OUT --path TEXTS/broken.jsonl", r"broken.jsonl, line 2 is no JSON \(.*\); mend it$"),
        ("OUT --path TEXTS/cut.jsonl.gz", r"cut.jsonl.gz cannot be read \(.*\); bring the whole file back$"),
        ("OUT --path TEXTS/latin.txt", r"latin.txt is not UTF-8; convert it, such as by iconv -f LATIN1 -t UTF-8$"),
    ],
)
def test_what_prepare_refuses(args, says, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = args.lower()
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    contents = {
        "number.jsonl": b'{"text": 3}',
        "broken.jsonl": b'{"text": "a"}\n{"text',
        "cut.jsonl.gz": gzip.compress(b'{"text": "a"}' * 99)[:-9],
        "latin.txt": b"caf\xe9",
    }
    for name, content in contents.items():
        (texts / name).write_bytes(content) if name in args else None
    args = args.split()
    with pytest.raises(SystemExit, match="2"):
        prepare.main([*args, "--tokenizer", "byte"])
    assert re.search(says, capsys.readouterr().err.strip())
