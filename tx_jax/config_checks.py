"""What the types and names of a config's fields promise, held for every config alike; config.py has the relations."""

import dataclasses
import math
import typing
from typing import Any, Literal

from tx_jax.errors import nearest, require


def check(config: Any) -> None:
    """Hold what types and names promise: choices, types, finite numbers, counts and sizes from 1, rates in [0, 1)."""
    for field in dataclasses.fields(config):
        name, kind = field.name, field.type
        value: Any = getattr(config, name)
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            close = None if value in choices else nearest(str(value), choices)
            hint = f"; did you mean {close!r}?" if close else ""
            require(value in choices, f"{name}={value!r:.80} is not one of {', '.join(choices)}{hint}")
            continue
        kinds: tuple[Any, ...] = typing.get_args(kind) or (kind,)
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        require(fits, f"{name}={value!r:.80} is {type(value).__name__}; it must be {wanted}")
        if type(value) in (int, float):
            _check_number(name, value, least=0 if field.default == 0 else 1)


def _check_number(name: str, value: float | int, least: int) -> None:
    require(math.isfinite(value), f"{name}={value} must be a finite number")
    if name.startswith(("n_", "d_")) or name.endswith(("_len", "_size")):
        require(value >= least, f"{name}={value} must be at least {least}")
    if name.endswith(("_steps", "_every", "seed")):
        require(value >= 0, f"{name}={value} must not be negative")
    if name.endswith("_rate"):
        require(0 <= value < 1, f"{name}={value} is a probability; it must be in [0, 1)")


def divisors(n: int) -> str:
    """The divisors of n up to 1024, as the remedy of an error lists them: a hostile n may be of any size."""
    return ", ".join(str(i) for i in range(1, min(n, 1024) + 1) if n % i == 0)
