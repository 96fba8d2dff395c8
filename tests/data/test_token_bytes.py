"""The bytes that tokens add, put together, are the text."""

import pytest

from tx_jax.data.token_bytes import token_bytes
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer

KINDS = ["trained", "gpt2", "unigram", "byte_fallback", "sentencepiece_bpe", "sentencepiece_unigram", "tiktoken"]


@pytest.mark.parametrize("name", KINDS)
def test_joined_they_are_the_decoded_text(name, kinds, texts):
    """But for a space in front, which some tokenizers add and their decoders take away."""
    tokenizer = kinds[name]
    parts = token_bytes(tokenizer)
    assert len(parts) == tokenizer.vocab_size
    assert not any(parts[i] for i in tokenizer.special_tokens.values())
    compared = 0
    for text in texts:
        ids = tokenizer.encode(text)
        joined = b"".join(parts[i] for i in ids).decode("utf-8", errors="replace")
        if "\ufffd" not in joined and all(parts[i] for i in ids):  # what is unknown has no text
            assert joined.lstrip(" ") == tokenizer.decode(ids).lstrip(" ")
            compared += 1
    assert compared > len(texts) / 2


def test_words_that_go_on(kinds):
    tokenizer = kinds["word_piece"]
    parts = token_bytes(tokenizer)
    assert any(part.startswith(b" ") for part in parts)
    assert not any(b"##" in part for part in parts if part.strip(b" #"))


def test_of_characters_and_bytes():
    assert token_bytes(CharTokenizer("aé€")) == [b"a", "é".encode(), "€".encode()]
    assert token_bytes(ByteTokenizer()) == [bytes([i]) for i in range(256)]
