"""Tokenizers made from the text to train on, by the name that DataConfig.tokenizer gives them."""

from collections.abc import Sequence

from tx_jax.data.subwords import SubwordTokenizer
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from tx_jax.errors import require

TRAINED = {  # (text, vocab_size, special_tokens) → tokenizer; only bpe has a choice of size, and special tokens
    "char": lambda text, vocab_size, special_tokens: CharTokenizer.train(text),
    "byte": lambda text, vocab_size, special_tokens: ByteTokenizer.train(text),
    "bpe": lambda text, vocab_size, special_tokens: SubwordTokenizer.train(
        text, vocab_size, special_tokens, split_digits=bool(special_tokens)
    ),
}


def train_tokenizer(
    kind: str, text: str, vocab_size: int, special_tokens: Sequence[str] = ()
) -> Tokenizer | SubwordTokenizer:
    """The tokenizer of a kind (TRAINED) that is made from the text.

    Args:
        vocab_size: ids of bpe, at most.
        special_tokens: names of ids that no text has. With some, digits stay apart.

    Raises:
        InputError: the text or the size will not do, the package tokenizers is missing for bpe, or special tokens are
            asked of another kind.
    """
    rule = f"tokenizer={kind!r} has no special tokens such as {special_tokens[0] if special_tokens else ''}"
    require(kind == "bpe" or not special_tokens, f"{rule}, which the objective needs; use --data.tokenizer bpe")
    return TRAINED[kind](text, vocab_size, special_tokens)
