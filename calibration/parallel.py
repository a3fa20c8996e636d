"""Work on every item of a calibration, on as many threads as there are cores and memory for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from dq_export.core.progress import Advance

Item = TypeVar("Item")
Result = TypeVar("Result")


SPACE = 1 << 29
"""Bytes that all threads together may take."""


def parallel(
    work: Callable[[Item], Result], items: Sequence[Item], progress: Advance, each: int, space: int = SPACE, unit: str = "inputs"
) -> list[Result]:
    """`work` of every item, in order, on as many threads as there are cores; numpy releases the interpreter's lock.

    Each multiplies its matrices on its own thread: threads of the BLAS beside ours took three times as long.

    Args:
        each: bytes that an item takes while it is worked on.
        space: bytes that all of them may take: so many cores are used as that allows, one at the least.
        unit: what the items are, for `progress`.
    """
    results = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads_for(each, space)) as pool:
        for result in pool.map(work, items):
            results.append(result)
            progress(len(results), len(items), unit)
    return results


def threads_for(each: int, space: int = SPACE) -> int:
    """As many threads as there are cores, and as `space` has room for items of `each` bytes; one at the least."""
    return max(1, min(os.cpu_count() or 1, space // max(each, 1)))
