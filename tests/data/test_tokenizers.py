"""Tokenizers: round trips, broken characters, files, and every error."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_jax.data.tokenizers import TOKENIZERS, ByteTokenizer, CharTokenizer, load_saved
from tx_jax.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)  # a slow machine is no error
@given(text=TEXT)
def test_decode_and_stream_undo_encode(kind, text):
    tokenizer = TOKENIZERS[kind].train(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == text


@settings(deadline=None)  # a slow machine is no error
@given(st.lists(st.integers(0, 255)))
def test_stream_equals_decode_for_any_bytes(ids):
    assert "".join(ByteTokenizer().stream(ids)) == ByteTokenizer().decode(ids)


def test_stream_waits_for_the_whole_character_and_shows_what_never_became_whole():
    assert list(ByteTokenizer().stream(ByteTokenizer().encode("a€"))) == ["a", "€"]
    assert list(ByteTokenizer().stream([97, 0xE2, 0x82])) == ["a", "\ufffd"]


def test_char_ids_follow_code_points_and_byte_ids_are_utf8():
    assert CharTokenizer.train("caab\U0001f600").encode("abc\U0001f600").tolist() == [0, 1, 2, 3]
    assert ByteTokenizer().encode("€").tolist() == [0xE2, 0x82, 0xAC]
    assert CharTokenizer.train("ab").vocab_size == 2
    assert ByteTokenizer().vocab_size == 256


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("make", [list, np.asarray, jnp.asarray])
def test_decode_takes_lists_and_arrays_and_nothing(kind, make):
    tokenizer = TOKENIZERS[kind].train("ab")
    assert tokenizer.decode(make([int(i) for i in tokenizer.encode("ba")])) == "ba"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("").shape == (0,)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_load_gives_what_was_saved_and_leaves_one_file(kind, tmp_path):
    tokenizer = TOKENIZERS[kind].train("héllo\n\ud800")
    TOKENIZERS["char"].train("old").save(tmp_path / "run")
    tokenizer.save(tmp_path / "run")
    loaded = load_saved(tmp_path / "run")
    assert loaded == tokenizer
    assert hash(loaded) == hash(tokenizer)
    assert loaded != CharTokenizer("x")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["tokenizer.json"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    CharTokenizer("a").save(tmp_path)
    monkeypatch.setattr(json, "dumps", lambda fields: "\ud800")  # cannot be written as UTF-8
    with pytest.raises(UnicodeEncodeError):
        CharTokenizer("b").save(tmp_path)
    assert load_saved(tmp_path) == CharTokenizer("a")


def test_refused_text():
    with pytest.raises(InputError, match=r"^character 'z' at index 3 is not among the 2 .*; .*use the tokenizer byte$"):
        CharTokenizer("a\U0001f600").encode("a\U0001f600azb")
    with pytest.raises(InputError, match=r"^character '\\udc80' at index 1 is not among the 2"):
        CharTokenizer("?a").encode("a\udc80")
    with pytest.raises(InputError, match=r"^character '\\udc80' at index 1 is a lone surrogate, .*; leave it out$"):
        ByteTokenizer().encode("€\udc80")
    for wrong in ("", "ba", "aa"):
        with pytest.raises(InputError, match=rf"^characters='{wrong}' must be one or more .*; use CharTokenizer.train"):
            CharTokenizer(wrong)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("ab")])
def test_refused_ids(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=rf"^id {wrong} at index 1 .* are 0 to {tokenizer.vocab_size - 1}$"):
            tokenizer.decode([0, wrong])
        with pytest.raises(InputError, match=f"^id {wrong} at index 0 stands"):
            list(tokenizer.stream([wrong]))
    with pytest.raises(InputError, match=r"^ids\(1, 2\) must be one row of ids; decode the rows"):
        tokenizer.decode(np.zeros((1, 2), np.int32))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"1", b"[]", b"{}", b'{"kind": []}', b'{"kind": "word"}', b'{"kind": "char"}']
    + [b'{"kind": "byte", "x": 1}']
    + [json.dumps({"kind": "char", "characters": wrong}).encode() for wrong in ("ba", "", 1, ["a", "b"], None)],
)
def test_a_file_that_is_no_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer \(.*\); give the run directory") as error:
        load_saved(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read .*tokenizer.json \(No such file .*\); give the run directory"):
        load_saved(tmp_path / "nowhere")
