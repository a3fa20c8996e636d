"""Work on every item of a calibration, on as many threads as there are cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from .collect import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel(work: Callable[[Item], Result], items: Sequence[Item], progress: Progress) -> list[Result]:
    """`work` of every item, in order, on as many threads as there are cores; numpy releases the interpreter's lock.

    Each multiplies its matrices on its own thread: threads of the BLAS beside ours took three times as long.
    """
    results = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(work, items):
            results.append(result)
            progress(len(results), len(items))
    return results
