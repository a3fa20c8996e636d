"""Scale tables with zero points as tables without: one shift of the input, and steps that still cover its range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dq_export.core.table_file import Codes

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
LIMIT = 1.25
"""How much wider a step may become, which costs 2 dB of its rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asymmetric:
    """A table x = scale * (code - zero_point) for timesteps T, to be x = scale' * code' + shift with |code'| <= qmax.

    Args:
        scale: float32[T], > 0.
        zero_point: float32[T], rounded where the table is used: inside the range the result does not depend on its fraction.
        codes: of the table.
        qmax: the greatest code' of the graph's symmetric type.
    """

    scale: Float32
    zero_point: Float32
    codes: Codes
    qmax: int

    @property
    def middle(self) -> Float64:
        """float64[T]: the middle of the range that has codes."""
        steps = (self.codes.least + self.codes.greatest) / 2 - np.rint(self.zero_point.astype(np.float64))
        middle: Float64 = self.scale * steps
        return middle

    def widened(self, shift: float) -> Float64:
        """float64[T], >= 1: by how much each step must grow for the range to keep its codes about `shift`.

        One code may be lost at an end: 2^bits codes are one more than a symmetric type has.
        """
        half = (self.codes.greatest - self.codes.least) / 2
        reach = half + np.abs(self.middle - shift) / self.scale
        widened: Float64 = np.maximum(1.0, (reach - 1) / self.qmax)
        return widened


def common_shift(tables: Sequence[Asymmetric], *, shifts: bool) -> float:
    """The shift of one input, or of inputs that share one, about which all tables widen least; 0 where that costs nothing.

    m minimizes the greatest |middle - m| / scale. Some m keeps it within r for all rows where middle_i - middle_j <=
    r (scale_i + scale_j) for each two of them, so r is the greatest of those quotients.

    Args:
        shifts: whether the input takes up a shift at all.
    """
    if not shifts or all((table.widened(0.0) == 1).all() for table in tables):
        return 0.0
    middle = np.concatenate([table.middle for table in tables])
    scale = np.concatenate([table.scale for table in tables]).astype(np.float64)
    least = ((middle[:, None] - middle) / (scale[:, None] + scale)).max()
    return float((middle - least * scale).max())
