"""Configs as JSON: ours to text and back, without loss, and anyone's from a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from tx_jax.errors import InputError, require

C = TypeVar("C")
LIMIT = 25_000_000  # bytes of a file; the largest in use list the tokens that a vocabulary adds, in some megabytes


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


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, whoever wrote it.

    Raises:
        InputError: it cannot be read, is larger than LIMIT, or holds no JSON object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LIMIT + 1)
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror}); give the directory of a model, or of a run"
        ) from error
    require(len(content) <= LIMIT, f"{path} has more than {LIMIT:,} bytes, as no config has; fetch it again")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error!s:.80}); fetch it again") from error
    require(isinstance(values, dict), f"{path} is not a JSON object; fetch it again")
    return values


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
