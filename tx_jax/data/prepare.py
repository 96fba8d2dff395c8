"""Texts to token files: `python -m tx_jax.data.prepare OUT --path TEXTS`. Run it again, and it goes on.

Then `python train.py PRESET --data.path OUT`. Documents are read one after another, and never all at once.
"""

import dataclasses
import functools
import gzip
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import tyro

from tx_jax.command_line import one_line_errors, parse
from tx_jax.convert.sources import AnyTokenizer, load_tokenizer
from tx_jax.data.libraries import package
from tx_jax.data.token_bytes import token_bytes
from tx_jax.data.token_files import SHARD, is_token_files, open_token_files, write_token_files
from tx_jax.data.tokenizers import utf8
from tx_jax.data.trained import TRAINED, train_tokenizer
from tx_jax.data.vocabulary_files import find_tokenizer
from tx_jax.errors import InputError, require

ENDINGS = (".txt", ".jsonl", ".jsonl.gz")
AT_ONCE = 256  # documents, encoded together
SAMPLE = 2**25  # characters of the first documents, of which a tokenizer is made


@dataclasses.dataclass(frozen=True)
class Args:
    """Texts to token files."""

    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]  # a new directory, or one to go on with
    path: str | None = None  # a .txt or .jsonl(.gz) file, or a directory of them
    dataset: str | None = None  # instead: of Hugging Face's datasets, a name or a directory; needs .[datasets]
    split: str = "train"  # of the dataset
    field: str = "text"  # that has the text, in a line of JSON or in the dataset
    separator: str | None = None  # a line of .txt between documents, "" an empty one; None: a file is a document
    tokenizer: str = "bpe"  # char, byte or bpe, made of the first documents; or token files, or a model, that have one
    vocab_size: int = 32768  # of bpe, at most
    shard_size: int = SHARD  # tokens of a shard, at least


@one_line_errors()
def main(argv: list[str]) -> None:
    """Read, encode, write."""
    args = parse(Args, argv, prog="python -m tx_jax.data.prepare")
    one = (args.path is None) != (args.dataset is None)
    require(one, f"path={args.path!r} and dataset={args.dataset!r}: give one of them")
    require(args.shard_size >= 1, f"shard_size={args.shard_size} must be at least 1 token")
    home = Path(args.out).expanduser()
    empty = not home.exists() or (home.is_dir() and not any(home.iterdir()))
    mine = is_token_files(home) or (home / "tokenizer").is_dir()
    require(empty or mine, f"out={args.out!r} holds other files; use another directory")
    files = [] if args.path is None else text_files(args.path)
    told = {name: getattr(args, name) for name in ("path", "dataset", "split", "field", "separator", "tokenizer")}
    source = told | {"files": [[str(file), file.stat().st_size] for file in files]}
    tokenizer = choose_tokenizer(home, args, read_documents(args, files))
    encoded = encode_all(tokenizer, read_documents(args, files))
    index = write_token_files(home, report(encoded), tokenizer.vocab_size, source, args.shard_size)
    files_of = open_token_files(home)
    size = sum(len(part) for part in files_of.tokens)
    n = sum(shard["documents"] for shard in index["shards"])
    print(f"{home}: {n:,} documents, {size:,} tokens of {tokenizer.vocab_size:,}, {len(index['shards'])} shards")
    print(f"to train: python train.py PRESET --data.path {home}")


def text_files(path: str) -> list[Path]:
    """The files that a path stands for, in the order of their names.

    Raises:
        InputError: there are none.
    """
    root = Path(os.path.expanduser(path))
    files = sorted(file for file in root.rglob("*") if file.name.endswith(ENDINGS)) if root.is_dir() else [root]
    rule = f"path={path!r} is no file, nor a directory with any of *{', *'.join(ENDINGS)}"
    require(files and all(file.is_file() for file in files), f"{rule}; give such texts")
    return files


def read_documents(args: Args, files: Iterable[Path]) -> Iterator[str]:
    """The texts of all documents, one by one.

    Raises:
        InputError: a line is no JSON with that field, a text is not UTF-8, or the dataset is not there.
    """
    if args.dataset is not None:
        return _of_dataset(args)
    return itertools.chain.from_iterable(
        _of_text(file, args.separator) if file.suffix == ".txt" or ".jsonl" not in file.name else _of_lines(file, args)
        for file in files
    )


def _of_text(file: Path, separator: str | None) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(file):
        if separator is not None and line.rstrip("\r\n") == separator:
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _of_lines(file: Path, args: Args) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        try:
            text = json.loads(line)[args.field]
        except (ValueError, KeyError, TypeError) as error:
            rule = f"{file}, line {number}: is no JSON object with {args.field!r}"
            raise InputError(f"{rule}; mend it, or name another --field") from error
        require(isinstance(text, str), f"{file}, line {number}: {args.field!r} is no text; name another --field")
        yield text


def _lines(file: Path) -> Iterator[str]:
    try:
        opened: Any = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8", newline="") as text:
            yield from text
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8; convert it, such as by iconv -f LATIN1 -t UTF-8") from error


def _of_dataset(args: Args) -> Iterator[str]:
    datasets = package("datasets", "datasets")
    try:
        rows = datasets.load_dataset(args.dataset, split=args.split, streaming=True)
        for row in rows:
            yield row[args.field]
    except (KeyError, ValueError, FileNotFoundError, ConnectionError) as error:
        why = str(error).strip().split("\n")[0]
        rule = f"dataset={args.dataset!r} gives no split={args.split!r} with field={args.field!r} ({why:.120})"
        raise InputError(f"{rule}; name another") from error


def choose_tokenizer(home: Path, args: Args, documents: Iterator[str]) -> AnyTokenizer:
    """That which is there from an interrupted call or, kept in `home`, one that is made or that a model has."""
    held = find_tokenizer(home / "tokenizer")
    if held is not None:
        return held
    if args.tokenizer in TRAINED:
        sample, size = [], 0
        while size < SAMPLE and (text := next(documents, None)) is not None:
            sample.append(text)
            size += len(text)
        ends = ("<s>", "</s>") if args.tokenizer == "bpe" else ()
        made: AnyTokenizer = train_tokenizer(args.tokenizer, "\n".join(sample), args.vocab_size, ends)
    elif is_token_files(args.tokenizer):
        made = cast(AnyTokenizer, find_tokenizer(Path(args.tokenizer).expanduser() / "tokenizer"))
    else:
        made = load_tokenizer(args.tokenizer)
    made.save(home / "tokenizer")
    return made


def encode_all(tokenizer: AnyTokenizer, documents: Iterator[str]) -> Iterator[tuple[np.ndarray, int]]:
    """The ids of each document, between what begins and what ends a text, and the bytes that are predicted of it.

    Those are all, but for the first token's where nothing begins a text. Empty documents are left out.
    """
    ends = list(getattr(tokenizer, "eos_ids", ())[:1])
    begin = getattr(tokenizer, "bos_id", None)
    begins = ends if begin is None else [begin]  # as GPT-2 has it, a text begins where one has ended
    encode_each = getattr(tokenizer, "encode_each", functools.partial(map, tokenizer.encode))
    words = () if begins else token_bytes(tokenizer)
    texts = filter(None, documents)
    while group := list(itertools.islice(texts, AT_ONCE)):
        for text, ids in zip(group, encode_each(group), strict=True):
            given = 0 if begins else len(words[int(ids[0])])
            yield np.concatenate([begins, ids, ends]).astype(np.int64), len(utf8(text)) - given


def report(documents: Iterator[tuple[np.ndarray, int]], every: int = 10**5) -> Iterator[tuple[np.ndarray, int]]:
    """The documents, and a line for each so many of them."""
    for number, document in enumerate(documents, 1):
        if number % every == 0:
            print(f"{number:,} documents", file=sys.stderr)
        yield document


if __name__ == "__main__":
    main(sys.argv[1:])
