"""How often a fault is tried: a few times by `make test`, as often as the figures say by `make faults`."""

import os

FULL = os.environ.get("FAULTS") == "full"


def trials(few: int, full: int) -> range:
    return range(full if FULL else few)
