"""What the training of a block brought."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BlockOutcome:
    """What a training brought, on samples that took no part in it.

    Args:
        before, after: dB of the block's output against the float chain's, every timestep's noise counted by what it was at the
            start; equal where nothing was trained.
        kept: whether the block is the trained one.
    """

    name: str
    before: float
    after: float
    kept: bool
