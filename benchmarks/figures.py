"""What the benchmarks of quality measure of one engine."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """The figures of an engine of a small model.

    Args:
        sqnr: of the network calls of a guided trajectory against PyTorch, their mean in dB.
        worst: the lowest of these calls in dB.
        pictures: SQNR in dB of pictures from the same noise.
        read: share of the digits that are read as requested.
        distance: Frechet distance of the digits' features from those of real digits.
        size: bytes on disk.
        speed: time of the float graph on ONNX Runtime / time of the engine.
        coverage: share of the quantized FLOPs in low precision; NaN if nothing tells it.
    """

    sqnr: float
    worst: float
    pictures: float
    read: float
    distance: float
    size: int
    speed: float
    coverage: float

    def decibels(self) -> list[str]:
        """Return the cells of the three SQNRs."""
        return [f"{value:.1f}" for value in (self.sqnr, self.worst, self.pictures)]

    def megabytes(self) -> str:
        """Return the cell of the size."""
        return f"{self.size / 1e6:.2f}"

    def low_precision(self) -> str:
        """Return the cell of the coverage."""
        return f"{self.coverage:.0%}" if math.isfinite(self.coverage) else "-"
