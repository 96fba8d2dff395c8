"""Medians and ratios of several ways to do one thing, each done once in every round, so that all meet the same machine.

A way is a function that does it once and gives a `Turn`.
"""

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Turn(NamedTuple):
    """What one run gives."""

    speeds: dict[str, float]  # tokens/s by name, such as prefill, decode
    rows: list[list[int]]  # the tokens that it wrote


Run = Callable[[], Turn]


class Asked(NamedTuple):
    """A ratio that is asked for: `of`'s speed over that of the fastest of `over` that there is."""

    speed: str
    least: float
    of: str
    over: tuple[str, ...]


class Case(NamedTuple):
    """Something to measure: ways to do it, the ratios that are asked for, and what else is to be said."""

    runs: dict[str, Run]
    asked: tuple[Asked, ...] = ()
    notes: Callable[[], Iterable[str]] = lambda: ()
    identical: bool = False  # hold all ways to the same tokens


def measure(case: Case, rounds: int) -> None:
    """Run all in turn, one round more to warm up, and print medians, then the ratios, then the notes."""
    turns: dict[str, list[Turn]] = {name: [] for name in case.runs}
    for _ in range(rounds + 1):
        for name, run in case.runs.items():
            turns[name].append(run())
    told = {name: [list(map(int, row)) for row in found[-1].rows] for name, found in turns.items()}
    speeds = {name: [turn.speeds for turn in found[1:]] for name, found in turns.items()}
    for name, found in speeds.items():
        medians = [f"{key} {median(found, key):,.1f} tokens/s" for key in found[0]]
        print(f"  {name:>20}: {', '.join([*medians, _agreement(told, name)])}", flush=True)
    for asked in case.asked:
        if line := _ratio(asked, speeds):
            print(f"  {line}", flush=True)
    for line in case.notes():
        print(f"  {line}", flush=True)
    assert not case.identical or len({str(rows) for rows in told.values()}) == 1, "the texts differ"


def median(found: list[dict[str, float]], key: str) -> float:
    """Of one speed over the rounds."""
    return statistics.median(speeds[key] for speeds in found)


def _agreement(told: dict[str, list[list[int]]], name: str) -> str:
    rows, first = told[name], next(iter(told.values()))
    return f"{sum(a == b for a, b in zip(rows, first, strict=True))} of {len(rows)} texts as the first's"


def _ratio(asked: Asked, speeds: dict[str, list[dict[str, float]]]) -> str:
    """The ratio of medians, and the least and greatest of a round; nothing where there is no peer."""
    there = [name for name in asked.over if name in speeds]
    if not there:
        return ""
    peer = max(there, key=lambda name: median(speeds[name], asked.speed))
    by_round = [a[asked.speed] / b[asked.speed] for a, b in zip(speeds[asked.of], speeds[peer], strict=True)]
    ratio = median(speeds[asked.of], asked.speed) / median(speeds[peer], asked.speed)
    wide = f"{min(by_round):.2f}–{max(by_round):.2f} by round"
    kept = "kept" if ratio >= asked.least else "MISSED"
    return f"{asked.speed}: {asked.of} / {peer} = {ratio:.2f} ({wide}); asked {asked.least:.2f}: {kept}"
