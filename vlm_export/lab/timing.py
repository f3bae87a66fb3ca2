"""Seconds of several sides in turn, and what is said about them: medians, the middle half, and ratios in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

Measure = Callable[[], float]
"""Does the work of one turn and returns its seconds."""


def interleaved(
    sides: Mapping[str, Measure], rounds: int, told: Callable[[int], None] = lambda number: None
) -> dict[str, list[float]]:
    """Seconds of each side in each round.

    Each round starts with another side, so that none always runs behind the same one: what a side leaves behind in
    caches, clocks and heat is the next one's start.

    Args:
        sides: each has warmed up.
        told: called with the number of each round that has ended.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            times[name].append(sides[name]())
        told(number + 1)
    return times


def timed(run: Callable[[], Any]) -> Measure:
    """Measures one call; its first call, which is made here, warms up."""

    def measure() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    run()
    return measure


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """How many times as long the first took, round by round: what slows a machine for a while slows both sides."""
    return [a / b for a, b in zip(times, others, strict=True)]


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and the quartiles around it: half of the rounds lie between them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of `ratios`."""
    return float(median(ratios(times, others)))
