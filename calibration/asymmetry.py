"""Convert scale tables with zero points into symmetric ones: one shift of the input, and steps that cover its range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dq_export.core.table_file import Codes

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
LIMIT = 1.25
"""The greatest factor by which a step may widen, which costs 2 dB of rounding noise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asymmetric:
    """A table x = scale * (code - zero_point) for timesteps T, to be x = scale' * code' + shift with |code'| <= qmax.

    Args:
        scale: float32[T], > 0.
        zero_point: float32[T], rounded where the table is used: inside the range the result does not depend on its fraction.
        codes: the range of the table's codes.
        qmax: the greatest code' of the graph's symmetric type.
    """

    scale: Float32
    zero_point: Float32
    codes: Codes
    qmax: int

    @property
    def middle(self) -> Float64:
        """float64[T]: the middle of the range that the codes cover."""
        steps = (self.codes.lowest + self.codes.greatest) / 2 - np.rint(self.zero_point.astype(np.float64))
        middle: Float64 = self.scale * steps
        return middle

    def widened(self, shift: float) -> Float64:
        """float64[T], >= 1: the factor by which each step must grow so that codes around `shift` cover the range.

        One code may be lost at an end, because a symmetric type has one code less than 2^bits.
        """
        half = (self.codes.greatest - self.codes.lowest) / 2
        reach = half + np.abs(self.middle - shift) / self.scale
        widened: Float64 = np.maximum(1.0, (reach - 1) / self.qmax)
        return widened


def common_shift(tables: Sequence[Asymmetric], *, shifts: bool) -> float:
    """The shift of one input, or of inputs that share one, that widens the tables least; 0 if none needs to widen without it.

    m minimizes the greatest |middle - m| / scale. An m that keeps it within r for all rows exists if
    middle_i - middle_j <= r (scale_i + scale_j) for every two rows, so r is the greatest of those quotients.

    Args:
        shifts: whether the input can absorb a shift.
    """
    if not shifts or all((table.widened(0.0) == 1).all() for table in tables):
        return 0.0
    middle = np.concatenate([table.middle for table in tables])
    scale = np.concatenate([table.scale for table in tables]).astype(np.float64)
    reach = ((middle[:, None] - middle) / (scale[:, None] + scale)).max()
    return float((middle - reach * scale).max())
