"""Work on several threads: as many as there are cores and memory for."""

from __future__ import annotations

import threading
import time

import pytest

from dq_export.calibration.parallel import SPACE, parallel


def most_at_once(item_bytes: int, threads: int) -> int:
    """How many items `parallel` works on together; fails if `threads` never are."""
    together, lock, running, greatest = threading.Barrier(threads), threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal running, greatest
        with lock:
            running += 1
            greatest = max(greatest, running)
        together.wait(timeout=10)
        time.sleep(0.05)  # long enough for any more to come
        with lock:
            running -= 1
        return item

    items = list(range(2 * threads))
    assert parallel(work, items, lambda done, total, unit="": None, item_bytes) == items
    return greatest


def test_as_many_threads_work_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [most_at_once(item_bytes, threads) for item_bytes, threads in ((1, 8), (SPACE // 3, 3), (2 * SPACE, 1))] == [8, 3, 1]
