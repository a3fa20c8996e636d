"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3
MIB = 1 << 20
LARGE, USUAL = MIB, 32 * MIB
"""Bytes from which a block is a mapping of its own: within `large_blocks_mapped`, and glibc's own upper bound."""


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can.

    glibc keeps what was freed between two blocks that live; after a stage that is hundreds of megabytes, beside which the
    next stage maps gigabytes of weights.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Within it, each block of a MiB and more goes back to the system as soon as it is freed, where the library is glibc.

    glibc raises that bound to 32 MiB when it first frees such a block. While ONNX Runtime transposes and packs weights, their
    old copies then stay: a quarter of the weights, in some runs and not in others. Afterwards it is 32 MiB, so that what is
    timed does not pay for mappings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, USUAL)
