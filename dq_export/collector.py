"""Python's garbage collector, which walks every object of PyTorch and diffusers each time: 0.4 s for a million of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Within it nothing is collected: for imports and traces, which make objects that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def collector_spared() -> Iterator[None]:
    """Within it the collector passes over all that is there now; see `collect_everything`."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def collect_everything() -> None:
    """Free all garbage, and let later collections pass over what is left.

    To be called where a network or its graph ends, which are cycles: what is passed over is freed here or never.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
