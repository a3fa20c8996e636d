"""The SQNR of a result against its reference; only this module defines it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_SQNR = 200.0
"""The SQNR, in dB, of a result without error, whose logarithm does not exist; its negative stands for a missing reference."""


def decibels(signal: npt.ArrayLike, noise: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """10 log10(signal / noise), float64 of their common shape, within -MAX_SQNR and MAX_SQNR.

    Args:
        signal, noise: sums or means of squares, not negative. A noise of NaN or infinity, from a result that is not finite,
            gives -MAX_SQNR.
    """
    power, error = np.asarray(signal, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    ratio = 10 * np.log10(np.maximum(power, 1e-300) / np.where((error > 0) & np.isfinite(error), error, 1.0))
    limited = np.where(error == 0, MAX_SQNR, np.clip(ratio, -MAX_SQNR, MAX_SQNR))
    result: npt.NDArray[np.float64] = np.where(np.isfinite(error), limited, -MAX_SQNR)
    return result
