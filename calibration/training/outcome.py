"""What a training brought."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the training of a block, or of the whole network, brought, on samples that took no part in it.

    Args:
        before, after: dB of the output against the float network's; equal where nothing was trained. Of a block, every
            timestep's noise counted by what it was at the start; of the network, the mean over the timesteps.
        kept: whether what was trained is taken.
    """

    name: str
    before: float
    after: float
    kept: bool
