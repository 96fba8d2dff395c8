"""Every public name has a docstring with an example, which pytest runs where it stands, and says shapes of arrays."""

import inspect
import re
import typing

import jax
import jaxtyping
import numpy as np
import optax
import pytest

import tx_jax as tx

PUBLIC = {
    f"{thing.__module__}.{name}": thing
    for module in (tx, tx.inspect, tx.presets)
    for name, thing in vars(module).items()
    if not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing))
    if thing.__module__.startswith("tx_jax." if module is tx else module.__name__)
}
SHAPE = re.compile(r"\((?=[^)]*\b[A-Z]\b)\w+,( \w+,?)*\)")  # (B,), (rows, V), …: of one capital letter, at least
UNSHAPED = jax.Array, np.ndarray, inspect.Parameter.empty


def parts_of(kind):
    """A type, and what it is made of: of a union, a list, a function, …"""
    yield kind
    for part in kind if isinstance(kind, list) else typing.get_args(kind):
        yield from parts_of(part)


def without_shape(thing):
    """Parameters, fields and results that are arrays, or may be, and whose annotation has no shape."""
    if inspect.isclass(thing):
        kinds = inspect.get_annotations(thing)
    else:
        signature = inspect.signature(thing)
        kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        kinds["return"] = signature.return_annotation
    for name, kind in kinds.items():
        if kind == optax.OptState:  # a tree of any
            continue
        parts = [*parts_of(kind)]
        shaped = any(inspect.isclass(part) and issubclass(part, jaxtyping.AbstractArray) for part in parts)
        if not shaped and any(part in UNSHAPED for part in parts):
            yield name


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_an_example_is_given(name):
    assert ">>> " in (PUBLIC[name].__doc__ or "")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_shapes_are_said(name):
    assert SHAPE.search(PUBLIC[name].__doc__ or "") or not [*without_shape(PUBLIC[name])]
