"""Sentence embeddings: the mean of real tokens alone, in order; all-MiniLM-L6-v2 against transformers; refusals."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import sentences as checked
from tx_jax.convert.named import fetch_model
from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.errors import InputError

pytest.importorskip("tokenizers")
CFG = tx.ModelConfig(stack="encoder", vocab_size=20, max_len=24, d_model=12, n_heads=3, n_layers=1, positions="learned")
WORDS = [
    "the", "cats", "sat", "on", "a mat,", "naïve", "façade", "12,345", "中文字", "🙂", "don't", "!?", "e\u0301",
    "EMBEDDING", "tokenisation", "\0", "\n",
]  # fmt: skip

# The module once more, as a user has it: under pytest jaxtyping would refuse wrong types before our own rules do.
spec = importlib.util.spec_from_file_location("plain_sentences", checked.__file__)
plain = sys.modules["plain_sentences"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)


def sentences(n):
    rng = np.random.default_rng(4)
    return ["", " ", *(" ".join(rng.choice(WORDS, size)) for size in rng.geometric(0.03, n - 2))]


def word_level(before=(), after=()):
    """A tokenizer of the letters a to p, with tokens before and after a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = {letter: i for i, letter in enumerate("abcdefghijklmnop")} | {"[CLS]": 16, "[SEP]": 17}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = [(name, names[name]) for name in (*before, *after)]
    tokenizer.post_processor = processors.TemplateProcessing([*before, "$A", *after], special_tokens=special)
    tokenizer.add_special_tokens([name for name, _ in special])
    return SubwordTokenizer(tokenizer.to_str())


@pytest.fixture(scope="module")
def tiny():
    model = tx.build(CFG)
    return model, tx.init_params(model, jax.random.key(0))


@pytest.mark.parametrize("frame", [(["[CLS]"], ["[SEP]"]), ([], ["[SEP]"]), (["[CLS]"], []), ([], [])])
def test_a_vector_is_the_mean_over_the_texts_own_tokens(tiny, frame):
    model, params = tiny
    hidden = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs, method="hidden"))
    texts = ["abc", "", "a", "ponmlkjihgfedcbaaaaaaaaaa", "fb", "abcdefgh", "abc", "ppppppppp"]
    tokenizer = word_level(*frame)
    got = tx.encode_text(model, params, tokenizer, texts, max_len=9, batch_size=3, normalize=False)
    special = {"[CLS]": 16, "[SEP]": 17}
    for text, vector in zip(texts, got, strict=True):
        room = 9 - len(frame[0]) - len(frame[1])
        ids = [special[name] for name in frame[0]] + ["abcdefghijklmnop".index(letter) for letter in text[:room]]
        ids += [special[name] for name in frame[1]]
        n = len(ids)
        tokens, positions = jnp.array([ids + [0] * (9 - n)]), jnp.array([[*range(n)] + [-1] * (9 - n)])
        wanted = hidden(params, tokens, positions)[0][0, :n].mean(axis=0) if n else np.zeros(12)
        np.testing.assert_allclose(vector, wanted, atol=1e-5)
    unit = tx.encode_text(model, params, tokenizer, texts, max_len=9)
    lengths = np.linalg.norm(got, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, got / np.maximum(lengths, 1e-12), atol=1e-5)


def test_few_shapes_are_compiled(tiny):
    model, params = tiny
    tokenizer = word_level()
    before = checked._pooled._cache_size()
    for n in (1, 2, 3, 7, 14, 16, 17, 22):
        tx.encode_text(model, params, tokenizer, ["a" * n] * n, max_len=24, batch_size=5)
    assert checked._pooled._cache_size() - before <= 8  # 1, 2, 4 or 5 rows × 16 or 24 tokens


@pytest.mark.parametrize(
    ("texts", "options", "text"),
    [
        ([], {}, r"texts=\[\]: give at least one text"),
        ("one", {}, r"texts='one' is one text; wrap it as \[text\]"),
        (["a", 3], {}, r"texts holds \[3\], which is no text; give strings"),
        (["a"], {}, "max_len=256 must be from 3, room for a token, to 24, the model's max_len"),
        (["a"], {"max_len": 2}, "max_len=2 must be from 3, room"),
        (["a"], {"max_len": 9, "batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_refuses(tiny, texts, options, text):
    with pytest.raises(InputError, match=f"^{text}"):
        plain.encode_text(*tiny, word_level(["[CLS]"], ["[SEP]"]), texts, **options)


def test_refuses_the_tokenizer_of_another_model():
    model = tx.build(tx.ModelConfig(**{**vars(CFG), "vocab_size": 5}))
    with pytest.raises(InputError, match="tokens holds id 15; the vocabulary is 0 … 4"):
        tx.encode_text(model, {}, word_level(), ["ap"], max_len=9)


def test_minilm_is_that_of_transformers(fetched):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    home = fetched(fetch_model, "minilm")
    found, texts = tx.load_pretrained(home), sentences(100)
    got = tx.encode_text(tx.build(found.cfg), found.params, tx.load_tokenizer(home), texts)
    tokenizer, model = hf.AutoTokenizer.from_pretrained(home), hf.BertModel.from_pretrained(home)
    for text, vector in zip(texts, got, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(axis=0)
        assert vector @ torch.nn.functional.normalize(mean, dim=0).numpy() >= 0.99999
    assert max(map(len, texts)) > 900, "no text is cut"
