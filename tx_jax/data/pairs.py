"""Pairs of lines, a source and its target: from a table, from two files of aligned lines, or made by a rule.

Each line that cannot be used is counted and named by its number, and refused or, if asked for, left out; none is put
beside another's translation in silence.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tx_jax.data.corpora import corpus_file
from tx_jax.data.libraries import package
from tx_jax.errors import InputError, require

SHOWN = 5  # bad lines that an error tells one by one
Fault = tuple[int, str]  # a line's number, from 1, and what is wrong with it


class Pairs(NamedTuple):
    """Sources, their targets, and the lines that they stood in."""

    sources: list[str]
    targets: list[str]
    lines: list[int]

    def take(self, members: Iterable[int]) -> "Pairs":
        """The pairs of these indices."""
        return _pairs([(self.sources[i], self.targets[i], self.lines[i]) for i in members])


def _pairs(rows: Sequence[tuple[str, str, int]]) -> Pairs:
    return Pairs([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def load_pairs(path: str | None, target_path: str | None, corpus: str, bad_lines: str) -> Pairs:
    """The pairs of a user's files, or if path is None those of a corpus.

    Args:
        path: a table of tab-separated UTF-8 lines, source, target and whatever follows; or the sources, one a line.
        target_path: the targets, one a line, where path has the sources alone.
        corpus: a key of CORPORA whose text is such a table, or of MADE.
        bad_lines: refuse | skip: what happens to lines without a source or a target, with a tab or a column too many
            or too few, or that are not UTF-8.

    Raises:
        InputError: a file cannot be read or has no pairs, the two have not as many lines, or a line is refused.
    """
    if path is None and corpus in MADE:
        return MADE[corpus]()
    if path is None:
        path = str(corpus_file(corpus))
    rows = _table(path) if target_path is None else _aligned(path, target_path)
    kept, faults = [], []
    for number, row in enumerate(rows, 1):
        fault = row if isinstance(row, str) else _fault_of(*row)
        if fault is None:
            kept.append((*row, number))
        else:
            faults.append((number, fault))
    report_faults(path, faults, len(kept) + len(faults), bad_lines)
    require(kept, f"path={path!r} holds no pairs; give lines of a source, a tab and a target")
    return _pairs(kept)


def report_faults(name: str, faults: Sequence[Fault], n_lines: int, bad_lines: str) -> None:
    """Refuse lines that cannot be used, or say on standard error that they are left out.

    Raises:
        InputError: there are some, and bad_lines is not skip.
    """
    if not faults:
        return
    shown = "; ".join(f"line {number} {fault}" for number, fault in faults[:SHOWN])
    more = f"; and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
    says = f"{name}: {len(faults):,} of {n_lines:,} lines cannot be used: {shown}{more}"
    require(bad_lines == "skip", f"{says}. Mend them, or leave them out by --data.bad-lines skip")
    print(f"{says}; left out", file=sys.stderr)


def _lines(path: str, name: str = "path") -> list[bytes]:
    """The lines of a file, split at newlines alone: other separators may stand inside a sentence."""
    try:
        content = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise InputError(f"{name}={path!r} cannot be read ({error.strerror}); give a file of lines") from error
    content = content.removeprefix(b"\xef\xbb\xbf")  # a mark that Windows writes before UTF-8
    return [line.removesuffix(b"\r") for line in content.removesuffix(b"\n").split(b"\n")] if content else []


def _text(line: bytes) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _table(path: str) -> Iterator[tuple[str, str] | str]:
    """The first two columns of each line, or what is wrong with it. The first line says how many there are."""
    lines = _lines(path)
    n_columns = lines[0].count(b"\t") + 1 if lines else 2
    rule = f"path={path!r} begins with a line of one column; give a source, a tab and a target a line, or the targets"
    require(n_columns > 1, f"{rule} in a file of their own by --data.target-path")
    for line in lines:
        text = _text(line)
        columns = (text or "").split("\t")
        fault = "is not UTF-8" if text is None else "is empty" if not text else None
        if fault is None and len(columns) != n_columns:
            fault = f"has {len(columns)} column{'s' * (len(columns) > 1)}, not the {n_columns} of the first line"
        yield (columns[0], columns[1]) if fault is None else fault


def _aligned(path: str, target_path: str) -> Iterator[tuple[str, str] | str]:
    sources, targets = _lines(path), _lines(target_path, "target_path")
    rule = f"path={path!r} has {len(sources):,} lines and target_path={target_path!r} has {len(targets):,}"
    require(len(sources) == len(targets), f"{rule}; line n of the one must be the translation of line n of the other")
    for both in zip(sources, targets, strict=True):
        source, target = map(_text, both)
        yield "is not UTF-8" if source is None or target is None else (source, target)


def _fault_of(source: str, target: str) -> str | None:
    empty = [name for name, text in (("source", source), ("target", target)) if not text.strip()]
    return f"has an empty {empty[0]}" if empty else "holds a tab" if "\t" in source + target else None


def split_pairs(pairs: Pairs, valid_fraction: float, test_fraction: float) -> tuple[Pairs, Pairs, Pairs]:
    """The pairs to train on, to validate with and to test on.

    A source's side is a function of its text, so all targets of a source are on one side, and stay there when pairs are
    added. Fractions are those of the sources, nearly.

    Raises:
        InputError: one of the three has no pairs.
    """
    share = np.array([_share(source.strip()) for source in pairs.sources])
    side = np.where(share < test_fraction, 2, np.where(share < test_fraction + valid_fraction, 1, 0))
    parts = [pairs.take(np.flatnonzero(side == i).tolist()) for i in range(3)]
    for name, part in zip(("train on", "validate with", "test on"), parts, strict=True):
        rule = f"{len(pairs.sources):,} pairs leave none to {name}"
        require(part.sources, f"{rule}; give more, or other --data.valid-fraction and --data.test-fraction")
    return parts[0], parts[1], parts[2]


def _share(text: str) -> float:
    """A number in [0, 1) that is the text's own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def by_source(pairs: Pairs) -> tuple[list[str], list[list[str]]]:
    """Each source once, and all of its targets: a translation may be as good as any of them.

    >>> by_source(Pairs(["a", "b", "a"], ["x", "y", "z"], [1, 2, 3]))
    (['a', 'b'], [['x', 'z'], ['y']])
    """
    found: dict[str, list[str]] = {}
    for source, target in zip(pairs.sources, pairs.targets, strict=True):
        found.setdefault(source, []).append(target)
    return list(found), list(found.values())


def number_words(n: int = 40_000) -> Pairs:
    """Numbers below a million in digits and in English words, drawn at random.

    Half are as likely as any other. Of the other half each number of digits is, and how many of them zeros follow, so
    that short and round ones are there, too.
    """
    words, rng = package("num2words", "translate").num2words, np.random.default_rng(0)
    digits = rng.integers(1, 7, n - n // 2)
    first = rng.integers(1, digits + 1)  # digits before the zeros
    head = rng.integers(np.where(first > 1, 10 ** (first - 1), 0), 10**first)
    numbers = [*rng.integers(1_000_000, size=n // 2).tolist(), *(head * 10 ** (digits - first)).tolist()]
    return Pairs([str(i) for i in numbers], [words(i) for i in numbers], list(range(1, len(numbers) + 1)))


MADE: dict[str, Callable[[], Pairs]] = {"number_words": number_words}  # corpora that a rule makes
