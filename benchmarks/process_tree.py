"""Measures the peak memory of a process and its descendants by sampling."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

INTERVAL = 0.02
"""Seconds between two samples."""
GROWTH = 1.01
"""Growth of the pages in memory between two exact sums. An exact sum delays the process that is measured."""
KIB = 1024


def run_measured(command: list[str]) -> tuple[float, float, float]:
    """Run a command without its output.

    The tree's memory is sampled to 1 %, as proportional set size, which counts shared pages once. The kernel's figure of one
    process includes the shortest peak. The larger of the two is returned as the tree's peak.

    Returns:
        Seconds; peak memory of the whole tree in GB; peak memory of the largest process in GB, from the kernel.
    """
    start, peak, largest = time.monotonic(), 0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        tree = _tree(process.pid)
        resident = sum(map(_resident, tree))
        if resident > largest * GROWTH:  # otherwise the exact sum, which is smaller, cannot exceed the peak by much
            peak, largest = max(peak, sum(map(_proportional, tree))), resident
        time.sleep(INTERVAL)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    single = usage.ru_maxrss * KIB
    return time.monotonic() - start, max(peak, single) / 1e9, single / 1e9


def _tree(root: int) -> list[int]:
    """Return the process and its descendants."""
    processes = [root]
    for process in processes:
        for task in Path(f"/proc/{process}/task").glob("*"):
            try:
                processes += map(int, (task / "children").read_text().split())
            except OSError:  # it has ended
                continue
    return processes


def _resident(process: int) -> int:
    """Return the bytes in memory; 0 if the process has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def _proportional(process: int) -> int:
    """Return the bytes in memory, each page divided by the processes that share it; 0 if the process has ended."""
    try:
        rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(row.split()[1]) * KIB for row in rows if row.startswith("Pss:"))
