"""The outcome of a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of training a block or the whole network, measured on samples that were not trained on.

    Args:
        before, after: SQNR of the output against the float network's, dB; equal if nothing was trained. A block's SQNR weighs
            the noise of every timestep by its noise at the start. The network's SQNR is the mean over the timesteps.
        kept: whether the result uses the trained values.
    """

    name: str
    before: float
    after: float
    kept: bool
