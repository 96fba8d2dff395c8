"""Tokenizers of public models: the ids of the libraries that read the same files, streaming, special tokens, errors."""

import base64
import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tx_jax.data.byte_ranks import CL100K, TiktokenTokenizer
from tx_jax.data.subwords import SentencePieceTokenizer, SubwordTokenizer
from tx_jax.errors import InputError

JSON = ["trained", "gpt2", "word_piece", "unigram", "byte_fallback"]
SENTENCEPIECE = ["sentencepiece_bpe", "sentencepiece_unigram"]
ALL = [*JSON, *SENTENCEPIECE, "tiktoken"]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("name", JSON)
def test_ids_are_those_of_the_tokenizers_library(name, begin, kinds, texts):
    oracle = pytest.importorskip("tokenizers").Tokenizer.from_str(kinds[name].json)
    oracle.no_truncation()
    oracle.no_padding()
    for text in texts:
        expected = oracle.encode(text, add_special_tokens=begin).ids
        ids = kinds[name].encode(text, special=True, add_special_tokens=begin)
        assert ids.dtype == np.int32
        assert ids.tolist() == expected


@pytest.mark.parametrize("name", [name for name in JSON if name != "unigram"])
def test_plain_ids_are_those_of_the_library_told_to_read_special_tokens_as_text(name, kinds, texts):
    oracle = pytest.importorskip("tokenizers").Tokenizer.from_str(kinds[name].json)
    oracle.encode_special_tokens = True
    oracle.no_truncation()
    oracle.no_padding()
    for text in texts:
        assert kinds[name].encode(text).tolist() == oracle.encode(text, add_special_tokens=False).ids


def test_gpt2_files_give_the_ids_of_the_library_that_builds_from_them(kinds, texts):
    implementations = pytest.importorskip("tokenizers.implementations")
    model = json.loads(kinds["trained"].json)["model"]
    oracle = implementations.ByteLevelBPETokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    for text in texts:
        assert kinds["gpt2"].encode(text).tolist() == oracle.encode(text).ids


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_ids_and_text_are_those_of_sentencepiece(name, kinds, texts):
    oracle = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    oracle.LoadFromSerializedProto(kinds[name].model)
    for text in texts:
        ids = oracle.encode(text)
        assert kinds[name].encode(text).tolist() == ids
        assert kinds[name].decode(ids) == oracle.decode(ids)


def test_ids_are_those_of_tiktoken(kinds, texts):
    tokenizer = kinds["tiktoken"]
    lines = (line.split() for line in tokenizer.ranks.splitlines())
    ranks = {base64.b64decode(token): int(i) for token, i in lines}
    library = pytest.importorskip("tiktoken")
    oracle = library.Encoding("", pat_str=CL100K, mergeable_ranks=ranks, special_tokens=dict(tokenizer.special))
    for text in texts:
        assert tokenizer.encode(text).tolist() == oracle.encode_ordinary(text)
        assert tokenizer.encode(text, special=True).tolist() == oracle.encode(text, allowed_special="all")


@pytest.mark.parametrize("name", ["trained", "gpt2", "tiktoken", "sentencepiece_bpe"])
def test_decode_undoes_encode(name, kinds, texts):
    texts = [text for text in texts if "▁" not in text or name != "sentencepiece_bpe"]  # which writes spaces so
    for text in texts:
        assert kinds[name].decode(kinds[name].encode(text)) == text
    for text in texts[::20]:
        assert "".join(kinds[name].stream(kinds[name].encode(text))) == text


@pytest.mark.parametrize("name", ALL)
def test_stream_is_decode_for_any_ids(name, kinds):
    tokenizer, rng = kinds[name], np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(tokenizer.vocab_size, size=rng.integers(30))
        pieces = list(tokenizer.stream(ids))
        assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["trained", "tiktoken", "byte_fallback", "sentencepiece_bpe"])
def test_stream_waits_for_the_whole_character_and_no_longer(name, kinds):
    tokenizer = kinds[name]
    pieces = [piece for piece in tokenizer.stream(tokenizer.encode("a é aa \U0001f602 a")) if piece]
    assert "".join(pieces) == "a é aa \U0001f602 a"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) >= 5


@pytest.mark.parametrize("name", ["trained", "unigram", "sentencepiece_bpe"])
def test_stream_decodes_short_windows_only(name, kinds, monkeypatch):
    tokenizer, lengths = kinds[name], []
    ids = tokenizer.encode("a b " * 300)
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    assert "".join(tokenizer.stream(ids)) == decode(tokenizer, ids)
    assert max(lengths) < 10
    assert len(lengths) < 3 * len(ids)


@pytest.mark.parametrize("name", [name for name in ALL if name != "trained"])  # which has none
def test_special_tokens_are_text_unless_asked_for(name, kinds):
    tokenizer = kinds[name]
    assert tokenizer.special_tokens
    for token, i in tokenizer.special_tokens.items():
        text = f"a{token}a"
        assert tokenizer.token(i) == token
        assert tokenizer.token_id(token) == i
        assert i not in tokenizer.encode(text) or token == "[UNK]"
        assert tokenizer.encode(text, special=True).tolist().count(i) == 1
        assert token not in tokenizer.decode([i])
        assert tokenizer.decode([i], special=True) == token
        assert "".join(tokenizer.stream([i])) == ""


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("gpt2", [], []),
        ("word_piece", [2], [3]),
        ("unigram", [], [0]),
        *[("sentencepiece_bpe", [1], []), ("sentencepiece_unigram", [], [1]), ("tiktoken", [400], [])],
    ],
)
def test_begin_puts_around_a_text_what_the_model_does(name, before, after, kinds):
    plain = kinds[name].encode("a a").tolist()
    assert kinds[name].encode("a a", add_special_tokens=True).tolist() == [*before, *plain, *after]


def test_training_is_deterministic_and_has_the_256_bytes(kinds, texts):
    corpus = "low lower lowest " * 9
    assert SubwordTokenizer.train(corpus, 270) == SubwordTokenizer.train(corpus, 270)
    assert SubwordTokenizer.train("", 300).vocab_size == 256
    assert SubwordTokenizer.train(corpus, 256).encode("é").shape == (2,)
    assert SubwordTokenizer.train(corpus, 258).vocab_size == 258
    with pytest.raises(InputError, match=r"^vocab_size=255 must be at least 256, one for each byte$"):
        SubwordTokenizer.train(corpus, 255)


@pytest.mark.parametrize("name", ALL)
def test_refused_ids_and_text(name, kinds):
    tokenizer = kinds[name]
    for wrong in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(InputError, match=rf"^id {wrong} at index 1 .* are 0 to {tokenizer.vocab_size - 1}$"):
            tokenizer.decode([0, wrong])
        with pytest.raises(InputError, match=f"^id {wrong} at index 0 stands"):
            list(tokenizer.stream([wrong]))
    with pytest.raises(InputError, match=r"^ids\(1, 2\) must be one row of ids"):
        tokenizer.decode(np.zeros((1, 2), np.int32))
    for special in (False, True):
        with pytest.raises(InputError, match=r"^character '\\udc80' at index 1 is a lone surrogate, .*; leave it out$"):
            tokenizer.encode("a\udc80", special=special)
    assert tokenizer.decode(jnp.zeros((0,), jnp.int32)) == tokenizer.decode([]) == "".join(tokenizer.stream([])) == ""
    assert tokenizer.decode(range(tokenizer.vocab_size)) == "".join(tokenizer.stream(range(tokenizer.vocab_size)))
    assert hash(tokenizer) != hash(None)


BYTES = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
PANIC = '{"model": {"type": "BPE", "continuing_subword_prefix": "###", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}'


@pytest.mark.parametrize("content", ["", "1", "{}", "[]", '{"model": {}}', PANIC, "[" * 9999])
def test_a_malformed_tokenizer_json_is_refused(content):
    with pytest.raises(InputError, match=r"^the tokenizer.json is malformed \(.+\); take the file .* again$") as error:
        SubwordTokenizer(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"no model"])
def test_a_malformed_sentencepiece_model_is_refused(content):
    pytest.importorskip("sentencepiece")
    with pytest.raises(InputError, match=r"^the SentencePiece model is malformed \(.+\); take the file") as error:
        SentencePieceTokenizer(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["a", "a b c", "é 1", "YQ== x", "YQ== -1", "", "YQ== 1"])
def test_malformed_ranks_are_refused(content):
    pytest.importorskip("tiktoken")
    with pytest.raises(InputError, match=r"^the .tiktoken file .*; take the file") as error:
        TiktokenTokenizer(content)
    assert "\n" not in str(error.value)


def test_ranks_with_a_wrong_pattern_or_special_token_are_refused():
    pytest.importorskip("tiktoken")
    with pytest.raises(InputError, match=r"^the .tiktoken file and pattern are no vocabulary \(.+\); take the file"):
        TiktokenTokenizer(BYTES, pattern="(")
    for wrong in (-1, 0, 2**31):
        with pytest.raises(
            InputError, match=r"^special=\(\('<s>', .*\),\) must be ids of their own, of int32; take the"
        ):
            TiktokenTokenizer(BYTES, special=(("<s>", wrong),))


def test_ends_that_are_no_ids_are_refused(kinds):
    with pytest.raises(InputError, match=r"^id 999 cannot begin or end a text; the ids .* are 0 to 316$"):
        SubwordTokenizer(kinds["trained"].json, bos_id=999)
    with pytest.raises(InputError, match=r"^id -1 cannot begin or end a text"):
        SubwordTokenizer(kinds["trained"].json, eos_ids=(0, -1))
    with pytest.raises(InputError, match=r"^add_bos=True needs a bos_id$"):
        SentencePieceTokenizer(kinds["sentencepiece_bpe"].model, add_bos=True)
    with pytest.raises(InputError, match=r"^add_eos=True needs eos_ids$"):
        SentencePieceTokenizer(kinds["sentencepiece_bpe"].model, add_eos=True)


@pytest.mark.parametrize(
    ("make", "missing", "extra"),
    [
        (lambda: SubwordTokenizer("{}"), "tokenizers", "hf"),
        (lambda: SentencePieceTokenizer(b""), "sentencepiece", "sentencepiece"),
        (lambda: TiktokenTokenizer(BYTES), "tiktoken", "tiktoken"),
    ],
)
def test_a_missing_package_is_named(make, missing, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"^this needs the package {missing}; pip install 'tx_jax\[{extra}\]'$"):
        make()


def words_that_are_special():
    """Tokenizers that find "<end>" in every text, as a word of the vocabulary: by name, (tokenizer, its id)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<unk>": 0, "<end>": 1, "hi": 2, "<": 3, "e": 4, "n": 5, "d": 6, ">": 7, "end>": 8}
    found = {}
    for name, model in {
        "words": models.WordLevel(vocab, unk_token="<unk>"),
        "word pieces": models.WordPiece(vocab | {"##end>": 9}, unk_token="<unk>"),
        "whole words": models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True),
        "unigrams": models.Unigram([(piece, -1.0) for piece in vocab], unk_id=0),
    }.items():
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<unk>", "<end>"])
        found[name] = SubwordTokenizer(tokenizer.to_str())
    library, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    lines = {"sentence_iterator": iter(["hi end hide"] * 9), "vocab_size": 40, "user_defined_symbols": ["<end>"]}
    library.SentencePieceTrainer.train(**lines, hard_vocab_limit=False, model_writer=model, minloglevel=5)
    pieces = model.getvalue()
    end = SentencePieceTokenizer(pieces).token_id("<end>")
    return found | {"sentencepiece": SentencePieceTokenizer(pieces, special=(("<end>", end),))}


@pytest.mark.parametrize("name", ["words", "word pieces", "whole words", "unigrams", "sentencepiece"])
@pytest.mark.parametrize("text", ["hi <end> hi", "<end>", "<end><end>hi", "<<end>>"])
def test_a_special_token_that_is_typed_stays_text_whatever_the_vocabulary(name, text):
    pytest.importorskip("tokenizers")
    tokenizer = words_that_are_special()[name]
    end = tokenizer.special_tokens["<end>"]
    assert end not in tokenizer.encode(text)
    if isinstance(tokenizer, SubwordTokenizer):
        one, other = tokenizer.encode_each([text, "hi"])
        assert one.tolist() == tokenizer.encode(text).tolist()
        assert other.tolist() == tokenizer.encode("hi").tolist()
    assert tokenizer.encode("hi <end> hi", special=True).tolist().count(end) == 1


def test_a_special_token_that_cannot_be_text_is_refused():
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "!": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["!"])
    with pytest.raises(InputError, match=r"^the text holds !, which this tokenizer cannot read as text; leave it out$"):
        SubwordTokenizer(tokenizer.to_str()).encode("!")
