"""Latency of engines against each other, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .backend import Feed, Float32


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one network call."""

    median: float
    least: float


def measure(engines: Mapping[str, Callable[[Feed], Float32]], feed: Feed, *, rounds: int = 15) -> dict[str, Latency]:
    """Time one network call of each engine in turn, `rounds` times, after two warm-up rounds.

    Read the ratios: the engines see the same noise of the machine, single figures do not.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 2):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine(feed)
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: Latency(median=statistics.median(taken), least=min(taken)) for name, taken in times.items()}
