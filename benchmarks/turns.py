"""Times engines in turn, each turn in a process of its own: one is in memory at a time, and none sees another's threads.

`dq_export.timing` does so for what dq-export's backends load; these engines are also those of peers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from dq_export.deploy.latency import Latency

Feed = dict[str, Any]
ROUNDS, WARM_CALLS, CALLS = 2, 2, 3
"""Turns of each engine; untimed and timed calls of a turn."""


def time_in_turns(engines: Mapping[str, Callable[[], Any]], feed: Feed) -> dict[str, Latency]:
    """Time one network call of each engine. Every second round runs backwards, so all engines see the same noise.

    Args:
        engines: functions that load an engine, by its name. They are pickled.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(ROUNDS):
        for name, load in reversed(engines.items()) if number % 2 else engines.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                milliseconds[name] += process.submit(turn, load, feed).result()
    return {name: Latency(median=statistics.median(times), minimum=min(times)) for name, times in milliseconds.items()}


def turn(load: Callable[[], Any], feed: Feed) -> list[float]:
    """Load an engine, and return the milliseconds of its timed calls."""
    engine = load()
    for _ in range(WARM_CALLS):
        engine(feed)
    milliseconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        engine(feed)
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return milliseconds
