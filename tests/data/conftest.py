"""Texts that are hard to cut, and one small tokenizer of each kind that models are published with."""

import base64
import io
import json

import numpy as np
import pytest

from tx_jax.data.byte_ranks import CL100K, TiktokenTokenizer
from tx_jax.data.subwords import SentencePieceTokenizer, SubwordTokenizer
from tx_jax.data.vocabularies import from_gpt2

AWKWARD = [
    "", " ", "   ", "\n", "a\r\n\tb", "a" + " " * 300 + "b", "\0", "a\0b", "I'll we'RE don't", "3.14 1234567 ¼ ⅻ ٣",
    "👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301 n\u0303o\u0308", "नमस्ते ไทย 日本語 العربية עברית", "\ufeff\u200b\u00a0x\u2028y", "\ufffd",
    "<s>a</s>", "[CLS] a [SEP]", "<|endoftext|>", "▁a ▁▁", "<0x41>", "\U000f0000", "Ġ Ċ",
]  # fmt: skip
RANGES = (32, 127), (9, 33), (48, 58), (0, 0x250), (0x300, 0x370), (0x600, 0x6FF), (0x4E00, 0x4F00), (0x1F600, 0x1F650)
CORPUS = (
    "The cat sat on the mat; the dogs ran. Don't you see 12 or 345 naïve façades, \u4e2d\u6587 and \U0001f600?\n" * 20
)


def random_texts(number):
    rng = np.random.default_rng(0)
    characters = np.array([rng.integers(*RANGES[i], 32) for i in rng.integers(len(RANGES), size=number)])
    rows = (
        rng.permutation(np.concatenate(characters[rng.integers(number, size=3)]))[: rng.integers(40)]
        for _ in characters
    )
    return ["".join(map(chr, row)) for row in rows]


@pytest.fixture(scope="session")
def texts():
    return AWKWARD + random_texts(1000)


def sentencepiece_model(**options):
    sentencepiece, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=model, minloglevel=5, num_threads=1, **options
    )
    return model.getvalue()


def word_piece():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "a", "##a", "!", ".", "[", "]", "cl", "##t", "3"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.enable_truncation(3)  # as in the file of all-MiniLM-L6-v2; a tokenizer of ours never cuts a text
    tokenizer.enable_padding(length=5)
    return SubwordTokenizer(tokenizer.to_str())


def unigram():
    """T5's manner, where the end of a text is a word of the vocabulary too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [
        (piece, -1.0 - i) for i, piece in enumerate(["</s>", "<unk>", "▁", "▁a", "a", "b", "s", "<", "/", ">", "▁▁"])
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    tokenizer.add_special_tokens(["</s>"])
    return SubwordTokenizer(tokenizer.to_str(), eos_ids=(0,))


def byte_fallback():
    """LLaMA 2's manner: byte tokens for what has no token, and a space before the text that the decoder takes off."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "▁▁": 3, "a": 4, "▁a": 5} | {f"<0x{i:02X}>": 6 + i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "▁"), ("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<s>"])
    return SubwordTokenizer(tokenizer.to_str(), bos_id=1)


def tiktoken_file():
    """The ranks of a byte-level BPE: every byte, then the pairs of bytes of the corpus."""
    corpus = CORPUS.splitlines()[0].encode()
    pairs = sorted({corpus[i : i + 2] for i in range(len(corpus) - 1)})
    tokens = [bytes([i]) for i in range(256)] + pairs
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))


@pytest.fixture(scope="session")
def kinds():
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    trained = SubwordTokenizer.train(CORPUS, 400)
    model = json.loads(trained.json)["model"]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    bpe = {
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.99,
        "normalization_rule_name": "identity",
    }
    pieces = sentencepiece_model(vocab_size=360, remove_extra_whitespaces=False, **bpe)
    unigrams = sentencepiece_model(vocab_size=40, bos_id=-1, pad_id=2, eos_id=1)
    return {
        "trained": trained,
        "gpt2": from_gpt2(json.dumps(vocab), merges),
        "word_piece": word_piece(),
        "unigram": unigram(),
        "byte_fallback": byte_fallback(),
        "sentencepiece_bpe": SentencePieceTokenizer(pieces, 1, (2,), add_bos=True),
        "sentencepiece_unigram": SentencePieceTokenizer(unigrams, None, (1,), add_eos=True, special=(("<x>", 70),)),
        "tiktoken": TiktokenTokenizer(
            tiktoken_file(), CL100K, (("<|begin|>", 400), ("<|endoftext|>", 401)), bos_id=400, eos_ids=(401,)
        ),
    }  # fmt: skip
