"""Tokenizers made from the text to train on, by the name that DataConfig.tokenizer gives them."""

from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

TRAINED = {  # (text, vocab_size) → tokenizer; only bpe has a choice of size
    "char": lambda text, vocab_size: CharTokenizer.train(text),
    "byte": lambda text, vocab_size: ByteTokenizer.train(text),
    "bpe": SubwordTokenizer.train,
}


def train_tokenizer(kind: str, text: str, vocab_size: int) -> Tokenizer | SubwordTokenizer:
    """The tokenizer of a kind (TRAINED) that is made from the text.

    Args:
        vocab_size: ids of bpe, at most.

    Raises:
        InputError: the text or the size will not do, or the package tokenizers is missing for bpe.
    """
    return TRAINED[kind](text, vocab_size)
