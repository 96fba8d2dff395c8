"""The one error a user causes: a value, the rule it breaks, and the remedy, in one line.

Scripts print it and exit with 2; anything else that is raised is a fault of ours and keeps its traceback.
"""


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
