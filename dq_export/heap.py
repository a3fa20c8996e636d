"""Memory that was freed and not given back."""

from __future__ import annotations

import ctypes
import gc


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can.

    glibc keeps what was freed between two blocks that live; after a stage that is hundreds of megabytes, beside which the
    next stage maps gigabytes of weights.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
