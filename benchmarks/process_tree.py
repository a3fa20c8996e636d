"""Peak memory of a process and all that it starts, sampled while it runs."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

EVERY = 0.02
"""Seconds between two samples."""
GROWTH = 1.01
"""Of the pages in memory, from one exact sum to the next, which holds up the process that it reads."""
KIB = 1024


def run_measured(command: list[str]) -> tuple[float, float, float]:
    """Run a command, its output on stdout dropped.

    Returns:
        Seconds; GB of the whole tree at its peak; GB of the largest single process at its peak, as the kernel counts it.

    The tree's memory is sampled, pages that processes share counted once (their proportional set size), to 1 %. The kernel's
    figure of one process misses no peak however short, and the larger of the two is returned as the tree's.
    """
    start, peak, largest = time.monotonic(), 0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        tree = _tree(process.pid)
        resident = sum(map(_resident, tree))
        if resident > largest * GROWTH:  # only then can the exact sum, which is less, be well above the peak
            peak, largest = max(peak, sum(map(_proportional, tree))), resident
        time.sleep(EVERY)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    single = usage.ru_maxrss * KIB
    return time.monotonic() - start, max(peak, single) / 1e9, single / 1e9


def _tree(root: int) -> list[int]:
    """The process and its descendants."""
    processes = [root]
    for process in processes:
        for task in Path(f"/proc/{process}/task").glob("*"):
            try:
                processes += map(int, (task / "children").read_text().split())
            except OSError:  # it has ended
                continue
    return processes


def _resident(process: int) -> int:
    """Bytes in memory; 0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def _proportional(process: int) -> int:
    """Bytes in memory, each page divided by the number of processes that share it; 0 of a process that has ended."""
    try:
        rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(row.split()[1]) * KIB for row in rows if row.startswith("Pss:"))
