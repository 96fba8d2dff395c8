"""The one error a user causes: a value, the rule it breaks, and the remedy, in one line.

Scripts print it and exit with 2; anything else that is raised is a fault of ours and keeps its traceback.
"""


class InputError(ValueError):
    """A value given by the user breaks a rule; the message names value, rule and remedy."""


def require(ok: object, message: str) -> None:
    """Raise InputError(message) unless ok."""
    if not ok:
        raise InputError(message)
