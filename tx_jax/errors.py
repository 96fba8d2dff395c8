"""The one error a user causes: a value, the rule it breaks, and the remedy, in one line.

Scripts print it and exit with 2; anything else that is raised is a fault of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value given by the user breaks a rule; the message names value, rule and remedy.

    >>> from tx_jax import ModelConfig
    >>> try:
    ...     ModelConfig(d_model=60, n_heads=4, n_kv_heads=3)
    ... except InputError as error:
    ...     print(error)
    n_heads=4 must be a multiple of n_kv_heads=3; use 1, 2, 4
    """


def require(ok: object, message: str) -> None:
    """Raise InputError(message) unless ok."""
    if not ok:
        raise InputError(message)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What a misspelt name was to be, of the names that are known; None: none of them is like it.

    >>> nearest("gpt2-smal", ["gpt2-small", "llama3-8b"])
    'gpt2-small'
    """
    spelt = {one.lower(): one for one in known}
    return next((spelt[close] for close in difflib.get_close_matches(name.lower(), spelt, 1)), None)
