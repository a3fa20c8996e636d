"""Latency of several engines, timed in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .backend import Feed, Float32

BUDGET, LEAST_ROUNDS = 60.0, 5
"""Seconds for all rounds, and the number of rounds that are timed in any case."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one network call."""

    median: float
    minimum: float


def measure(engines: Mapping[str, Callable[[Feed], Float32]], feed: Feed, *, rounds: int = 15) -> dict[str, Latency]:
    """Time one network call of each engine in turn, `rounds` times after a warm-up, or fewer times if that takes over a minute.

    Before each timed call the engine runs once untimed, because the threads of the previous engine still spin for a while,
    and its weights fill the caches. Compare ratios, not single figures: noise of the machine affects all engines alike.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    turns, begin = 0, time.perf_counter()
    while turns <= rounds and not (turns > LEAST_ROUNDS and time.perf_counter() - begin > BUDGET):
        for name, engine in engines.items():
            engine(feed)
            start = time.perf_counter()
            engine(feed)
            times[name].append((time.perf_counter() - start) * 1e3)
        turns += 1
    return {name: Latency(median=statistics.median(seconds[1:]), minimum=min(seconds[1:])) for name, seconds in times.items()}
