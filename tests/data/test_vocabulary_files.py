"""Directories with a tokenizer: what is found first, what stands beside it, equality after a save, and every error."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tx_jax.data.subwords import SentencePieceTokenizer, SubwordTokenizer
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from tx_jax.data.vocabulary_files import find_tokenizer
from tx_jax.errors import InputError

ALL = (
    "trained",
    "gpt2",
    "word_piece",
    "unigram",
    "byte_fallback",
    "sentencepiece_bpe",
    "sentencepiece_unigram",
    "tiktoken",
)


@pytest.mark.parametrize("name", ALL)
def test_read_gives_what_was_saved(name, kinds, tmp_path):
    for tokenizer in (
        kinds[name],
        dataclasses.replace(kinds[name], bos_id=3, eos_ids=(5, 4), chat_template="{{ 'é' }}"),
    ):
        tokenizer.save(tmp_path)
        assert find_tokenizer(tmp_path) == tokenizer
        assert hash(find_tokenizer(tmp_path)) == hash(tokenizer)


def test_a_model_that_is_told_to_have_no_ends_has_none(kinds, tmp_path):
    tokenizer = SentencePieceTokenizer(kinds["sentencepiece_bpe"].model)
    tokenizer.save(tmp_path)
    assert find_tokenizer(tmp_path) == tokenizer


@pytest.mark.parametrize("name", ["trained", "gpt2", "unigram", "word_piece"])
def test_transformers_reads_what_was_saved(name, kinds, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    kinds[name].save(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (oracle.bos_token_id, oracle.eos_token_id) == (kinds[name].bos_id, next(iter(kinds[name].eos_ids), None))
    for text in texts[:300]:
        assert kinds[name].encode(text, special=True, add_special_tokens=True).tolist() == oracle(text)["input_ids"]


def test_our_own_kinds_are_read(tmp_path):
    for tokenizer in (ByteTokenizer(), CharTokenizer("ab")):
        tokenizer.save(tmp_path)
        assert find_tokenizer(tmp_path) == tokenizer


def test_the_first_file_counts(kinds, tmp_path):
    model = json.loads(kinds["gpt2"].json)["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    written = [
        ("ranks.tiktoken", kinds["tiktoken"].ranks),
        ("encoder.json", json.dumps(model["vocab"])),
        ("vocab.bpe", merges),
        ("vocab.json", json.dumps(model["vocab"])),
        ("merges.txt", merges),
        ("spiece.model", kinds["sentencepiece_unigram"].model),
        ("tokenizer.model", kinds["sentencepiece_bpe"].model),
        ("tokenizer.json", kinds["trained"].json),
    ]
    sizes = []
    for name, content in written:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        sizes.append(find_tokenizer(tmp_path).vocab_size)
    ranks, gpt2, unigram = kinds["tiktoken"].vocab_size - 2, kinds["gpt2"].vocab_size, 40
    assert sizes[:1] + sizes[2:3] + sizes[4:] == [sizes[0], gpt2, gpt2, unigram, 360, kinds["trained"].vocab_size]
    assert sizes[0] <= ranks


def test_a_directory_with_a_model_only(kinds, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(kinds["sentencepiece_bpe"].model)
    assert find_tokenizer(tmp_path) == kinds["sentencepiece_bpe"]  # begins as LLaMA
    (tmp_path / "tokenizer.model").rename(tmp_path / "spiece.model")
    (tmp_path / "spiece.model").write_bytes(kinds["sentencepiece_unigram"].model)
    assert find_tokenizer(tmp_path) == dataclasses.replace(kinds["sentencepiece_unigram"], special=())  # ends as T5
    (tmp_path / "tokenizer.model").write_text(kinds["tiktoken"].ranks)  # Llama 3's first release
    assert find_tokenizer(tmp_path).ranks == kinds["tiktoken"].ranks


def test_what_stands_beside_the_vocabulary(kinds, tmp_path):
    (tmp_path / "tokenizer.json").write_text(kinds["word_piece"].json)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "[CLS]"}, "eos_token": "cat"}')
    assert find_tokenizer(tmp_path) == SubwordTokenizer(kinds["word_piece"].json, 2, (5,))
    templates = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[SEP]", "chat_template": templates}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 3]}')
    assert find_tokenizer(tmp_path) == SubwordTokenizer(kinds["word_piece"].json, 2, (3, 4), "b")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 6}')
    (tmp_path / "chat_template.jinja").write_text("é\n", encoding="utf-8")
    assert find_tokenizer(tmp_path) == SubwordTokenizer(kinds["word_piece"].json, 2, (3, 6), "é\n")


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer_config.json", wrong) for wrong in ("", "[]", '{"bos_token": 1}', '{"chat_template": 1}', "[" * 99999)]
    + [("tokenizer_config.json", f'{{"eos_token_id": {wrong}}}') for wrong in ('"a"', "[true]", "[-1]", "1e9")]
    + [("tokenizer_config.json", f'{{"chat_template": {wrong}}}') for wrong in ('{"name": "default", "template": 1}',)]
    + [("generation_config.json", "1"), ("special_tokens_map.json", "{"), ("chat_template.jinja", b"\xff")]
    + [("tokenizer.json", wrong) for wrong in (b"\xff", "", "{}", '{"kind": "none"}')],
)
def test_a_broken_file_is_refused(file, content, kinds, tmp_path):
    kinds["trained"].save(tmp_path)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"^[^\n]+; [^\n]+$|must be [^\n]+$"):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "wrong", ["1", '{"a": {"content": "b", "special": true}}', '{"1": {"special": true}}', '{"1": 2}']
)
def test_broken_facts_beside_a_sentencepiece_model_are_refused(wrong, kinds, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(kinds["sentencepiece_bpe"].model)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"added_tokens_decoder": {wrong}}}')
    with pytest.raises(InputError, match=r"^added_tokens_decoder=.* in tokenizer_config.json must be tokens by id$"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": 1}')
    with pytest.raises(InputError, match=r"^add_bos_token=1 in tokenizer_config.json must be true or false$"):
        find_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_or_with_two(kinds, tmp_path):
    assert find_tokenizer(tmp_path) is None
    kinds["trained"].save(tmp_path)
    with pytest.raises(
        InputError, match=r"holds another kind of tokenizer \(tokenizer.json\); save in an empty directory"
    ):
        kinds["tiktoken"].save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(InputError, match=r"tokenizer.json is no regular file; put the file itself there$"):
        find_tokenizer(tmp_path)


def gpt2_directory(kinds, home, config):
    model = json.loads(kinds["gpt2"].json)["model"]
    (home / "vocab.json").write_text(json.dumps(model["vocab"]))
    (home / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (home / "tokenizer_config.json").write_text(json.dumps(config))
    return home


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"tokenizer_class": "Qwen2Tokenizer"}, "tokenizer_class='Qwen2Tokenizer' in tokenizer_config.json is not"),
        (
            {"tokenizer_class": ["GPT2Tokenizer"]},
            r"tokenizer_class=\['GPT2Tokenizer'\] in tokenizer_config.json is not",
        ),
        (
            {"add_prefix_space": True},
            "add_prefix_space=True in tokenizer_config.json is not honoured for vocab.json with",
        ),
        ({"add_eos_token": True}, "add_eos_token=True in tokenizer_config.json is not honoured for vocab.json with me"),
        ({"added_tokens_decoder": {"318": {"content": "<m>", "lstrip": True}}}, "lstrip of the token '<m>' in tokeni"),
        ({"added_tokens_decoder": {"7": {"content": "<m>"}}}, "'<m>' has id 7, which is another's in vocab.json; take"),
        (
            {"added_tokens_decoder": {"-1": {"content": "<m>"}}},
            "'<m>' has id -1, which is another's in vocab.json; take",
        ),
        ({"added_tokens_decoder": {"999": {"content": "a"}}}, "the added token 'a' has id 999, which is another's"),
        ({"add_bos_token": True, "bos_token": "<s>"}, "bos_token='<s>' is no token of vocab.json; take both files"),
        ({"add_bos_token": 1}, "add_bos_token=1 in tokenizer_config.json must be true or false"),
    ],
)
def test_what_is_not_gpt2s_is_refused_by_name(config, text, kinds, tmp_path):
    with pytest.raises(InputError, match=text):
        find_tokenizer(gpt2_directory(kinds, tmp_path, config))


def test_what_is_added_to_gpt2s_vocabulary(kinds, tmp_path):
    transformers = pytest.importorskip("transformers")
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    size = kinds["gpt2"].vocab_size
    added = {
        str(size - 1): {"content": "<|endoftext|>", **flags, "special": True},
        str(size): {"content": "<m>", **flags, "special": True},
        str(size + 1): {"content": "<w>", **flags, "special": False},
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "added_tokens_decoder": added}
    oracle = transformers.AutoTokenizer.from_pretrained(gpt2_directory(kinds, tmp_path, config))
    tokenizer = find_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"<|endoftext|>": size - 1, "<m>": size}
    for text in ("the <m>cat<w> <|endoftext|>", "a<w>b", " <m> "):
        assert tokenizer.encode(text, special=True).tolist() == oracle(text)["input_ids"]
    assert tokenizer.decode([size, size + 1]) == "<w>"
    begins = find_tokenizer(gpt2_directory(kinds, tmp_path, config | {"add_bos_token": True, "bos_token": "<m>"}))
    assert begins.encode("a", add_special_tokens=True).tolist() == [size, *tokenizer.encode("a")]
    assert begins.bos_id == size


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_is_elsewhere_or_is_none(name, kinds, tmp_path):
    home = tmp_path / "snapshots" / "0a1b"
    kinds["sentencepiece_bpe" if name == "tokenizer.model" else "trained"].save(home)
    (home / "chat_template.jinja").write_text("{{ 1 }}")
    whole = find_tokenizer(home)
    (tmp_path / "blobs").mkdir()
    (home / name).rename(tmp_path / "blobs" / "f")
    (home / name).symlink_to(Path("..", "..", "blobs", "f"))  # as in the cache of the Hub
    assert find_tokenizer(home) == whole
    (tmp_path / "blobs" / "f").rename(tmp_path / "f")
    for target, text in {"f": "is a link that leads out of its directory", "/dev/zero": "is no regular file"}.items():
        (home / name).unlink()
        (home / name).symlink_to(tmp_path / target)
        with pytest.raises(InputError, match=rf"{name} {text}; put the file itself there$"):
            find_tokenizer(home)
    (home / name).unlink()
    os.mkfifo(home / name)
    with pytest.raises(InputError, match=rf"{name} is no regular file; put the file itself there$"):
        find_tokenizer(home)


CHILD = """
import pathlib, re, sys, time, sentencepiece, tokenizers
from tx_jax.data.vocabulary_files import find_tokenizer
def memory(key): return int(re.search(rf"{key}:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before, started = memory("VmRSS"), time.process_time()
try:
    find_tokenizer(sys.argv[1])
except ValueError as error:
    print(time.process_time() - started, (memory("VmHWM") - before) / 1024, error)
"""
BOMBS = [  # file, what it repeats, how often; more than what
    ("tokenizer_config.json", b"[],", 5_000_000, "of the characters ',[{', more than 524288"),
    ("tokenizer.json", b"[],", 12_000_000, "of the characters ',[{', more than 2097152"),
    ("tokenizer.json", b"", 1_500_000_000, "more than 40,000,000 bytes, as no such file has"),
    ("tokenizer.model", b"", 1_500_000_000, "more than 40,000,000 bytes, as no such file has"),
    ("tokenizer.model", b"\n\0", 19_000_000, r"of the characters '\n', more than 1048576"),
    ("vocab.json", b"[],", 12_000_000, "of the characters ',[{', more than 524288"),
    ("merges.txt", b"a b\n", 9_000_000, r"of the characters '\n', more than 524288"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(("name", "unit", "times", "text"), BOMBS)
def test_bombs(name, unit, times, text, tmp_path):
    beside = {"tokenizer_config.json": "tokenizer.model", "vocab.json": "merges.txt", "merges.txt": "vocab.json"}
    (tmp_path / beside.get(name, "none")).write_text("{}")
    (tmp_path / name).write_bytes(b"[" + unit * times + b"1]" if unit == b"[]," else unit * times)
    if not unit:
        os.truncate(tmp_path / name, times)  # sparse
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    seconds, growth, line = done.stdout.split(" ", 2)
    assert line.endswith(f"{text}; fetch it again\n")
    assert float(seconds) < 1
    assert float(growth) < 300  # MiB
