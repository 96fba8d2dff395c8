"""Texts to token files: `python -m tx_jax.data.prepare OUT --path TEXTS`. Run it again, and it goes on.

Then `python train.py PRESET --data.path OUT`. Documents are read one after another, and never all at once.
"""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import tyro

from tx_jax.command_line import one_line_errors, parse
from tx_jax.convert.sources import AnyTokenizer, load_tokenizer
from tx_jax.data.libraries import package
from tx_jax.data.token_bytes import token_bytes
from tx_jax.data.token_files import SHARD, begin_token_files, is_token_files, write_token_files
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
    files = [] if args.path is None else text_files(args.path)
    source = {field: value for field, value in dataclasses.asdict(args).items() if field != "out"}
    source |= {"path": str(Path(args.path)) if args.path else None, "sha256": hash_of(files)}
    index = begin_token_files(home, source)
    try:
        tokenizer = choose_tokenizer(home, args, read_documents(args, files))

        def encoded(first: int) -> Iterator[tuple[np.ndarray, int]]:
            return report(encode_all(tokenizer, itertools.islice(read_documents(args, files), first, None)))

        index = write_token_files(home, index, encoded, tokenizer.vocab_size, args.shard_size)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise
    size, n = (sum(shard[name] for shard in index["shards"]) for name in ("size", "documents"))
    print(f"{home}: {n:,} documents, {size:,} tokens of {tokenizer.vocab_size:,}, {len(index['shards'])} shards")
    print(f"to train: python train.py PRESET --data.path {home}")


def hash_of(files: Iterable[Path]) -> str:
    """A SHA-256 of names and contents."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            found.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def text_files(path: str) -> list[Path]:
    """The files that a path stands for, in the order of their names.

    Raises:
        InputError: there are none.
    """
    root = Path(os.path.expanduser(path))
    files = sorted(file for file in root.rglob("*") if file.name.endswith(ENDINGS)) if root.is_dir() else [root]
    rule = f"path={path!r} is none of *{', *'.join(ENDINGS)}, nor a directory with any"
    fits = files and all(file.is_file() and file.name.endswith(ENDINGS) for file in files)
    require(fits, f"{rule}; give such texts")
    return files


def read_documents(args: Args, files: Iterable[Path]) -> Iterator[str]:
    """The texts of all documents that are not empty, one by one.

    Raises:
        InputError: a line is no JSON with that field, a text is not UTF-8, or the dataset is not there.
    """
    texts = (_of_text(file, args.separator) if file.suffix == ".txt" else _of_lines(file, args) for file in files)
    return filter(None, itertools.chain.from_iterable(texts) if args.dataset is None else _of_dataset(args))


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
        where = f"{file}, line {number}"
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where} is no JSON ({error!s:.80}); mend it") from error
        fields = ", ".join(row) if isinstance(row, dict) else "none"
        text = row.get(args.field) if isinstance(row, dict) else None
        require(isinstance(text, str), f"{where} has no text as {args.field!r}, of {fields:.200}; name another --field")
        yield cast(str, text)


def _lines(file: Path) -> Iterator[str]:
    try:
        opened: Any = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8", newline="") as text:
            yield from text
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8; convert it, such as by iconv -f LATIN1 -t UTF-8") from error
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{file} cannot be read ({error}); bring the whole file back") from error


def _of_dataset(args: Args) -> Iterator[str]:
    datasets = package("datasets", "datasets")
    home = Path(str(args.dataset))
    try:
        if (home / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(home)[args.split]
        elif (home / "state.json").is_file():  # of one split
            rows = datasets.load_from_disk(home)
        else:
            rows = datasets.load_dataset(args.dataset, split=args.split, streaming=True)
    except (KeyError, ValueError, OSError) as error:
        why = str(error).strip().split("\n")[0]
        rule = f"dataset={args.dataset!r} gives no split={args.split!r} ({why:.120})"
        raise InputError(f"{rule}; name another, or a directory") from error
    fields = rows.column_names or list(next(iter(rows)))
    rule = f"dataset={args.dataset!r} has no field={args.field!r}, of {', '.join(fields):.200}"
    require(args.field in fields, f"{rule}; name one of them")
    for row in rows:
        text = row[args.field]
        require(isinstance(text, str), f"dataset={args.dataset!r} has {text!r:.40} as {args.field!r}, which is no text")
        yield text


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
    part = home / "tokenizer.part"  # it may be several files
    shutil.rmtree(part, ignore_errors=True)
    made.save(part)
    part.rename(home / "tokenizer")
    return made


def encode_all(tokenizer: AnyTokenizer, documents: Iterator[str]) -> Iterator[tuple[np.ndarray, int]]:
    """The ids of each document, between what begins and what ends a text, and the bytes that are predicted of it.

    Those are all, but for the first token's where nothing begins a text.
    """
    ends = list(getattr(tokenizer, "eos_ids", ())[:1])
    begin = getattr(tokenizer, "bos_id", None)
    begins = ends if begin is None else [begin]  # as GPT-2 has it, a text begins where one has ended
    encode_each = getattr(tokenizer, "encode_each", functools.partial(map, tokenizer.encode))
    words = () if begins else token_bytes(tokenizer)
    while group := list(itertools.islice(documents, AT_ONCE)):
        for text, ids in zip(group, encode_each(group), strict=True):
            given = 0 if begins or not len(ids) else len(words[int(ids[0])])
            yield np.concatenate([begins, ids, ends]).astype(np.int64), len(utf8(text)) - given


def report(documents: Iterator[tuple[np.ndarray, int]], every: float = 5.0) -> Iterator[tuple[np.ndarray, int]]:
    """The documents, and a line each so many seconds."""
    said, n_tokens = time.monotonic(), 0
    for number, document in enumerate(documents, 1):
        n_tokens += len(document[0])
        if time.monotonic() > said + every:
            said = time.monotonic()
            print(f"{number:,} documents, {n_tokens:,} tokens", file=sys.stderr)
        yield document


if __name__ == "__main__":
    main(sys.argv[1:])
