"""Peak memory of a process and all that it starts, sampled while it runs."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

EVERY = 0.02
"""Seconds between two samples."""
KIB = 1024


def run_measured(command: list[str]) -> tuple[float, float, float]:
    """Run a command, its output on stdout dropped.

    Returns:
        Seconds; GB of the whole tree at its peak; GB of the largest single process at its peak, as the kernel counts it.

    The tree's memory is the sum of its processes' resident pages, sampled: pages that two of them share count twice, so it is
    an upper bound but for peaks shorter than two samples. The kernel's figure misses no peak, and no sum is below it.
    """
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            break
        peak = max(peak, sum(map(_resident, _tree(process.pid))))
        time.sleep(EVERY)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    single = usage.ru_maxrss * KIB
    return time.monotonic() - start, max(peak, single) / 1e9, single / 1e9


def _tree(root: int) -> list[int]:
    """The process and its descendants."""
    found = [root]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*"):
            try:
                found += map(int, (task / "children").read_text().split())
            except OSError:  # it has ended
                continue
    return found


def _resident(process: int) -> int:
    """Bytes in memory; 0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0
