"""Pairs of lines: every line that is none is named by its number; no source stands on two sides of the split."""

import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx_jax.data.corpora import CORPORA
from tx_jax.data.pairs import Pairs, by_source, load_pairs, number_words, split_pairs
from tx_jax.errors import InputError

LINES = "a b\tx\nc\ty z\n"


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def load(path, target_path=None, bad_lines="refuse"):
    return load_pairs(path, target_path, "tatoeba_en_es", bad_lines)


@pytest.mark.parametrize(
    "content",
    [LINES, LINES.rstrip("\n"), LINES.replace("\n", "\r\n"), b"\xef\xbb\xbf" + LINES.encode(),
     "a b\tx\tCC-BY\nc\ty z\tCC-BY\n"],
)  # fmt: skip
def test_a_table_is_its_first_two_columns(write, content):
    assert load(write("a.tsv", content)) == Pairs(["a b", "c"], ["x", "y z"], [1, 2])


def test_two_files_are_put_together_line_by_line(write):
    got = load(write("a.en", "one\u2028still one\ntwo\n"), write("a.es", "uno\ndos"))
    assert got == Pairs(["one\u2028still one", "two"], ["uno", "dos"], [1, 2])


BAD = {
    "line 2 has an empty source": "a\tb\n\tb\n",
    "line 2 has an empty target": "a\tb\nc\t  \n",
    "line 3 has 3 columns, not the 2 of the first line": "a\tb\nc\td\ne\tf\tg\n",
    "line 2 has 1 column, not the 2 of the first line": "a\tb\nc\nd\te\n",
    "line 2 is not UTF-8": b"a\tb\nc\xe9\td\n",
}


@pytest.mark.parametrize("says", BAD)
def test_a_line_that_is_no_pair_is_named_or_left_out(write, says, capsys):
    path = write("a.tsv", BAD[says])
    n = len(BAD[says].strip(b"\n" if isinstance(BAD[says], bytes) else "\n").splitlines())
    with pytest.raises(InputError) as error:
        load(path)
    remedy = "Mend them, or leave them out by --data.bad-lines skip"
    assert str(error.value) == f"{path}: 1 of {n} lines cannot be used: {says}. {remedy}"
    kept = load(path, bad_lines="skip")
    assert capsys.readouterr().err == f"{path}: 1 of {n} lines cannot be used: {says}; left out\n"
    assert len(kept.lines) == n - 1
    assert int(says.split()[1]) not in kept.lines
    assert all(source.strip() and target.strip() for source, target in zip(kept.sources, kept.targets, strict=True))


def test_bad_lines_of_two_files_have_the_numbers_of_both(write):
    paths = write("a.en", b"one\n\ntwo\xff\nthree\tx\nfour\n"), write("a.es", b"uno\ndos\ntres\ncuatro\ncinco\n")
    with pytest.raises(
        InputError, match=r"3 of 5 .*line 2 has an empty source; line 3 is not UTF-8; line 4 holds a tab"
    ):
        load(*paths)
    assert load(*paths, bad_lines="skip") == Pairs(["one", "four"], ["uno", "cinco"], [1, 5])


def test_many_bad_lines_are_counted(write):
    with pytest.raises(InputError, match=r"20 of 21 lines .*line 6 has an empty source; and 15 more\. Mend"):
        load(write("a.tsv", "a\tb\n" + "\tb\n" * 20))


ERRORS = {
    r"path='.*a\.en' has 2 lines and target_path='.*a\.es' has 1; line n of the one must be the translation": (
        "a\nb\n", "a\n",
    ),
    r"cannot be read \(No such file or directory\); give a file of lines": (None, None),
    r"begins with a line of one column; give a source, a tab and a target a line, or": ("a\n", None),
    r"holds no pairs; give lines of a source, a tab and a target": ("", None),
}  # fmt: skip


@pytest.mark.parametrize("says", ERRORS)
def test_files_that_are_no_pairs_are_refused_whatever_the_flag(write, says, tmp_path):
    source, target = ERRORS[says]
    path = str(tmp_path / "none") if source is None else write("a.en", source)
    target = None if target is None else write("a.es", target)
    for bad_lines in ("refuse", "skip"):
        with pytest.raises(InputError, match=says):
            load(path, target, bad_lines)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\t"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(texts, texts), min_size=1))
def test_what_was_written_is_read(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("pairs")
    sources, targets = map(list, zip(*pairs, strict=True))
    table, left, right = folder / "a.tsv", folder / "a.en", folder / "a.es"
    first = pairs[0][0].startswith("\ufeff")  # a mark, not text
    table.write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8", newline="")
    left.write_text("".join(f"{a}\n" for a in sources), encoding="utf-8", newline="")
    right.write_text("".join(f"{b}\n" for b in targets), encoding="utf-8", newline="")
    expected = Pairs(sources, targets, list(range(1, len(pairs) + 1)))
    if not (first or any(text.startswith("\ufeff") for text in targets[:1])):
        assert load(str(table)) == load(str(left), str(right)) == expected


@given(st.lists(st.tuples(st.text("ab ", min_size=1, max_size=4), texts), min_size=1, max_size=60), st.data())
def test_a_source_is_on_one_side_and_stays_there(pairs, data):
    pairs = Pairs([a for a, _ in pairs], [b for _, b in pairs], list(range(len(pairs))))
    try:
        parts = split_pairs(pairs, 0.3, 0.3)
    except InputError as error:
        assert "leave none to" in str(error)  # noqa: PT017
        return
    sides = [{source.strip() for source in part.sources} for part in parts]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert sorted(line for part in parts for line in part.lines) == pairs.lines
    some = pairs.take(data.draw(st.sets(st.sampled_from(range(len(pairs.lines))), min_size=1)))
    try:
        again = split_pairs(some, 0.3, 0.3)
    except InputError:
        return
    for whole, part in zip(parts, again, strict=True):
        assert set(part.lines) <= set(whole.lines)


def test_a_split_without_pairs_is_refused():
    with pytest.raises(InputError, match=r"^1 pairs leave none to .*; give more, or other --data.valid-fraction and"):
        split_pairs(Pairs(["a"], ["b"], [1]), 0.1, 0.1)


def test_numbers_are_their_words():
    pairs = number_words(4000)
    told = dict(zip(pairs.sources, pairs.targets, strict=True))
    assert (told["0"], told["7"], told["42"]) == ("zero", "seven", "forty-two")
    digits = np.bincount([len(source) for source in pairs.sources])
    assert digits[0] == 0
    assert len(digits) == 7
    assert digits[1:].min() > 250
    assert digits[6] > 2000
    assert pairs == number_words(4000)


def test_tatoeba_has_its_pairs_and_is_split_by_sentence(fetched, monkeypatch):
    pairs = fetched(load_pairs, None, None, "tatoeba_en_es", "refuse")
    assert len(pairs.sources) == 140_868
    assert pairs.sources[0], pairs.targets[0] == ("Go.", "Ve.")
    parts = split_pairs(pairs, 0.01, 0.02)
    sides = [set(part.sources) for part in parts]
    assert sum(map(len, sides)) == len(set(pairs.sources)) == 119_342
    assert abs(len(sides[2]) / 119_342 - 0.02) < 0.002
    sources, references = by_source(parts[2])
    assert sum(map(len, references)) == len(parts[2].lines) > len(sources) == len(sides[2])
    monkeypatch.setattr(subprocess, "run", None)
    assert "tatoeba_en_es" in CORPORA
    assert load_pairs(None, None, "tatoeba_en_es", "refuse") == pairs  # from the cache
