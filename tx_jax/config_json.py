"""Configs to JSON text and back, without loss: what `config.json` of a run directory holds."""

import dataclasses
import json
from typing import Any, TypeVar

from tx_jax.errors import InputError, require

C = TypeVar("C")


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


def _from_dict(kind: type[C], values: Any) -> C:
    name = kind.__name__
    require(isinstance(values, dict), f"{name}={values!r} must be a JSON object of its fields")
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}  # pyright: ignore
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{name} has no field {', '.join(unknown)}; its fields are {', '.join(fields)}")
    nested = {
        key: _from_dict(fields[key], value) for key, value in values.items() if dataclasses.is_dataclass(fields[key])
    }
    return kind(**(values | nested))
