"""Tokenizers built from the parts of a vocabulary: GPT-2's files, the metadata of a GGUF, and our own kinds."""

import json

import pytest

from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from tx_jax.data.vocabularies import PRE, from_gguf, from_gpt2, to_hugging_face
from tx_jax.errors import InputError


def gguf_of_bpe(kinds, pre, **further):
    model = json.loads(kinds["trained"].json)["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|end|>", "<user>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(model["vocab"]) + [3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    } | {f"tokenizer.{key}": value for key, value in further.items()}


def gguf_of_sentencepiece(kinds, **further):
    processor = kinds["sentencepiece_bpe"]._processor
    ids = range(processor.vocab_size())
    types = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.{key}": value for key, value in further.items()}


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "'ll", " see", " 1234", "!!", "  ", " é"]),
        ("llama-bpe", ["I", "'LL", " see", " ", "123", "4", "!!\n", " ", " é"]),
        ("qwen2", ["I", "'LL", " see", " ", "1", "2", "!!\n", " ", " é"]),
        ("smollm", ["I", "'ll", " see", " ", "1", "2", "!!", "\n", " é"]),
        ("default", ["I", "'", "ll", " see", " ", "123", "4"]),
    ],
)
def test_words_are_cut_as_the_publisher_cuts_them(pre, words):
    tokenizers = pytest.importorskip("tokenizers")
    steps = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE[pre].steps}}
    plain = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    cut = tokenizers.Tokenizer.from_str(json.dumps(plain | steps)).pre_tokenizer.pre_tokenize_str("".join(words))
    assert ["".join(words)[start:end] for _, (start, end) in cut] == words


@pytest.mark.parametrize("pre", PRE)
def test_a_gguf_of_bytes_gives_back_every_text(pre, kinds, texts):
    tokenizer = from_gguf(gguf_of_bpe(kinds, pre))
    for text in texts[::5]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text or pre == "qwen2"  # which writes accents in one way, Unicode's NFC
    end = tokenizer.vocab_size - 2
    assert tokenizer.special_tokens == {"<|end|>": end}
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (end, (end,), None)
    assert tokenizer.encode("a<user>").tolist()[-1] == end + 1
    assert (tokenizer.encode("a", add_special_tokens=True)[0] == end) == (pre == "llama-bpe")


def test_a_gguf_of_gpt2s_kind_has_the_ids_of_the_vocabulary(kinds, texts):
    tokenizer = from_gguf(gguf_of_bpe(kinds, "gpt-2", chat_template="{{ 1 }}", **{"ggml.add_bos_token": True}))
    assert tokenizer.chat_template == "{{ 1 }}"
    for text in texts:
        assert tokenizer.encode(text).tolist() == kinds["trained"].encode(text).tolist()
    assert tokenizer.encode("a", add_special_tokens=True).tolist() == [tokenizer.bos_id, *tokenizer.encode("a")]


def test_a_gguf_of_sentencepiece_has_the_ids_of_the_model(kinds, texts):
    tokenizer, model = from_gguf(gguf_of_sentencepiece(kinds)), kinds["sentencepiece_bpe"]
    assert tokenizer.special_tokens == model.special_tokens
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=True, special=True).tolist()
        assert ids == model.encode(text, add_special_tokens=True, special=True).tolist()
        assert tokenizer.decode(ids) == model.decode(ids)
    bare = from_gguf(gguf_of_sentencepiece(kinds, **{"ggml.add_space_prefix": False, "ggml.add_bos_token": False}))
    assert bare.token(int(bare.encode("The", add_special_tokens=True)[0]))[0] == "T"


def test_the_turns_of_gemma_are_special_and_its_other_words_of_that_type_are_text(kinds):
    metadata = gguf_of_sentencepiece(kinds, chat_template="<start_of_turn>{{ messages[0].content }}\n\n")
    more, size = ["<start_of_turn>", "<b>", "\n\n"], len(metadata["tokenizer.ggml.tokens"])
    for key, values in {"tokens": more, "scores": [0.0] * 3, "token_type": [4] * 3}.items():
        metadata[f"tokenizer.ggml.{key}"] += values
    tokenizer = from_gguf(metadata)
    assert tokenizer.special_tokens["<start_of_turn>"] == size
    assert not {"<b>", "\n\n"} & tokenizer.special_tokens.keys()
    assert size not in tokenizer.encode("a<start_of_turn>b")
    assert size in tokenizer.encode("a<start_of_turn>b", special=True)
    assert tokenizer.encode("a<b>\n\n").tolist()[-2:] == [size + 1, size + 2]


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("ggml.model", wrong) for wrong in (None, "bert", ["gpt2"])]
    + [("ggml.pre", wrong) for wrong in (None, "tekken", 1)]
    + [("ggml.tokens", wrong) for wrong in (None, "ab", [1, 2])]
    + [("ggml.token_type", wrong) for wrong in (None, [1], ["a"])]
    + [("ggml.merges", wrong) for wrong in (None, ["a"], ["a b c"], [1], ["xx yy"])]
    + [("ggml.bos_token_id", wrong) for wrong in ("a", -1, 10**6)]
    + [("ggml.add_bos_token", 1), ("chat_template", 1)],
)
def test_metadata_that_is_no_vocabulary_is_refused(key, wrong, kinds):
    with pytest.raises(InputError, match=r"^[^\n]+; [^\n]+$"):
        from_gguf(gguf_of_bpe(kinds, "gpt-2", **{key: wrong}))


@pytest.mark.parametrize(
    ("key", "wrong"), [("scores", None), ("scores", [1.0]), ("tokens", ["a"]), ("token_type", [1])]
)
def test_metadata_that_is_no_sentencepiece_model_is_refused(key, wrong, kinds):
    with pytest.raises(InputError, match=r"^tokenizer.ggml.[a-z_]+ must be a list of [^\n]+; convert the model"):
        from_gguf(gguf_of_sentencepiece(kinds, **{f"ggml.{key}": wrong}))
    for score in (1e300, float("nan"), float("-inf")):
        scores = [score, *gguf_of_sentencepiece(kinds)["tokenizer.ggml.scores"][1:]]
        with pytest.raises(InputError, match=r"^tokenizer.ggml.scores must be finite numbers of 32 bits; convert"):
            from_gguf(gguf_of_sentencepiece(kinds, **{"ggml.scores": scores}))
    twice = {"ggml.tokens": ["a"] * 3, "ggml.scores": [0.0] * 3, "ggml.token_type": [1] * 3}
    with pytest.raises(InputError, match=r"^the SentencePiece model is malformed \([^\n]+\); take"):
        from_gguf(gguf_of_sentencepiece(kinds, **twice))


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ("", ""),
        ("[]", ""),
        ('{"a": "b"}', ""),
        ('{"a": -1}', ""),
        ('{"a": 0}', "a"),
        ('{"a": 0}', "a b c"),
        ("{}", "a b"),
    ],
)
def test_files_that_are_not_of_gpt2s_kind_are_refused(vocab, merges):
    with pytest.raises(
        InputError, match=r"^(vocab.json and merges.txt are not|the tokenizer.json is)[^\n]+; take [^\n]+$"
    ):
        from_gpt2(vocab, merges)


def test_our_own_kinds_have_the_same_ids_elsewhere(texts):
    text = "".join(texts)
    for tokenizer in (CharTokenizer.train(text), ByteTokenizer()):
        converted = to_hugging_face(tokenizer)
        assert isinstance(converted, SubwordTokenizer)
        assert converted.vocab_size == tokenizer.vocab_size
        for text in texts:
            ids = converted.encode(text)
            assert ids.tolist() == tokenizer.encode(text).tolist()
            assert converted.decode(ids) == text
    with pytest.raises(
        InputError, match=r"^the tokenizer cannot encode the text \(.*\); its tokenizer.json has no token"
    ):
        to_hugging_face(CharTokenizer("ab")).encode("c")
