"""Configs as JSON: ours to text and back, without loss, and anyone's from a file, within bounds."""

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any, TypeVar

from tx_jax.errors import InputError, require

C = TypeVar("C")
LIMIT = 1_000_000  # bytes of a config; those in use have some thousands
VALUES = b",[{"  # a value of JSON, or its name, comes after one of these
MAX_VALUES = 2**19  # of JSON; 65,536 tensors of a safetensors file, or 70,000 added tokens, are about as many


def to_json(config: Any) -> str:
    """A config as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(kind: type[C], text: str) -> C:
    """The config of class `kind` that `to_json` wrote.

    Raises:
        InputError: `text` is not JSON, has a field that `kind` does not know, or breaks one of its rules.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error}); a config is written by tx_jax.config_json.to_json") from error
    return _from_dict(kind, values)


def read_object(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The object in a JSON file, whoever wrote it.

    Raises:
        InputError: it cannot be read, is larger than `limit` bytes, has more than MAX_VALUES values, leads out of its
            directory, or holds no JSON object.
    """
    content = read_bytes(path, limit)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error!s:.80}); fetch it again") from error
    require(isinstance(values, dict), f"{path} is not a JSON object; fetch it again")
    return values


def read_bytes(path: Path, limit: int, most: int = MAX_VALUES, signs: bytes = VALUES) -> bytes:
    """The content of a file of a directory that may come from anyone.

    Raises:
        InputError: it cannot be read, is no regular file, leads out of its directory, has more than `limit` bytes, or
            more than `most` of the characters `signs`.
    """
    try:
        about = path.stat()
        require(stat.S_ISREG(about.st_mode), f"{path} is no regular file; put the file itself there")
        check_link(path)
        with path.open("rb") as file:
            content = b"" if about.st_size > limit else file.read(limit + 1)
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror}); give the directory of a model, or of a run"
        ) from error
    large = max(about.st_size, len(content)) > limit
    require(not large, f"{path} has more than {limit:,} bytes, as no such file has; fetch it again")
    try:
        check_count(content, most, signs)
    except InputError as error:
        raise InputError(f"{path} is not read: {error}; fetch it again") from error
    return content


def check_count(content: bytes, most: int = MAX_VALUES, signs: bytes = VALUES) -> None:
    """Refuse a text with too many values before it is parsed, which would take seconds and gigabytes."""
    count = sum(map(content.count, signs))
    require(count <= most, f"it has {count} of the characters {signs.decode()!r}, more than {most}")


def check_link(path: Path) -> Path:
    """The path of a file that is there; a link may lead within its directory, or to the Hub cache's blobs.

    Raises:
        InputError: it leads elsewhere.
    """
    home = path.parent.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    within = any(path.resolve().is_relative_to(place) for place in homes)
    require(within, f"{path} is a link that leads out of its directory; put the file itself there")
    return path


def _from_dict(kind: type[C], values: Any) -> C:
    name = kind.__name__
    require(isinstance(values, dict), f"{name}={values!r} must be a JSON object of its fields")
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}  # pyright: ignore
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{name} has no field {', '.join(unknown[:3])}; its fields are {', '.join(fields)}")
    nested = {
        key: _from_dict(fields[key], value) for key, value in values.items() if dataclasses.is_dataclass(fields[key])
    }
    return kind(**(values | nested))
