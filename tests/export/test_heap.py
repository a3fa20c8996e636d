"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BLOCKS = """
import os
import sys
import numpy as np
from dq_export.heap import large_blocks_mapped, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

def fill():
    large = [np.ones(3 << 20, dtype=np.uint8) for _ in range(100)]
    return [np.ones(1 << 10, dtype=np.uint8) for _ in range(100)], large

np.ones(30 << 20, dtype=np.uint8)  # glibc raises its bound when this is freed
start = resident()
if sys.argv[1] == "mapped":
    with large_blocks_mapped():
        small, large = fill()
else:
    small, large = fill()
assert resident() > start + 250
del large
if sys.argv[1] == "returned":
    return_freed_memory()
print(resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep no such memory")
@pytest.mark.parametrize(("way", "stays"), [("plain", True), ("mapped", False), ("returned", False)])
def test_memory_freed_below_a_living_block_returns_to_the_system(way: str, stays: bool) -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKS, way], capture_output=True, text=True, check=True)
    assert (float(result.stdout) > 250) == stays, result.stdout
