"""Work on every item of a calibration, on as many threads as cores and memory allow."""

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
    work: Callable[[Item], Result],
    items: Sequence[Item],
    progress: Advance,
    item_bytes: int,
    space: int = SPACE,
    unit: str = "inputs",
) -> list[Result]:
    """`work(item)` for every item, in order, on as many threads as there are cores; numpy releases the interpreter's lock.

    BLAS uses one thread for each of ours: with threads of its own, the work took three times as long.

    Args:
        item_bytes: bytes that one item takes during the work.
        space: bytes that all items may take together; it limits the number of threads, which is at least one.
        unit: the name of the items, for `progress`.
    """
    results = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads_for(item_bytes, space)) as pool:
        for result in pool.map(work, items):
            results.append(result)
            progress(len(results), len(items), unit)
    return results


def threads_for(item_bytes: int, space: int = SPACE) -> int:
    """The number of threads: at most the number of cores, and at most `space` / `item_bytes`; at least one."""
    return max(1, min(os.cpu_count() or 1, space // max(item_bytes, 1)))
