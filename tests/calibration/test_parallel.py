"""Work on several threads: as many as there are cores and memory for."""

from __future__ import annotations

import threading
import time

import pytest

from dq_export.calibration.parallel import SPACE, parallel


def most_at_once(each: int, wanted: int) -> int:
    """How many items `parallel` works on together; fails where `wanted` never are."""
    together, lock, running, most = threading.Barrier(wanted), threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(timeout=10)
        time.sleep(0.05)  # long enough for any more to come
        with lock:
            running -= 1
        return item

    items = list(range(2 * wanted))
    assert parallel(work, items, lambda done, total, unit="": None, each) == items
    return most


def test_as_many_threads_work_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [most_at_once(each, wanted) for each, wanted in ((1, 8), (SPACE // 3, 3), (2 * SPACE, 1))] == [8, 3, 1]
