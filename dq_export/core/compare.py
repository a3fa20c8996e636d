"""How far a result is from its reference: the only place that says what an SQNR is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_SQNR = 200.0
"""dB of a result without any error, which has no logarithm; the negative of it where there is no reference."""


def decibels(signal: npt.ArrayLike, noise: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """10 log10(signal / noise), float64 of their common shape, within -MAX_SQNR and MAX_SQNR.

    Args:
        signal, noise: sums or means of squares, not negative. A noise of NaN or infinity, of a result that is not finite,
            gives -MAX_SQNR.
    """
    power, error = np.asarray(signal, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    ratio = 10 * np.log10(np.maximum(power, 1e-300) / np.where((error > 0) & np.isfinite(error), error, 1.0))
    limited = np.where(error == 0, MAX_SQNR, np.clip(ratio, -MAX_SQNR, MAX_SQNR))
    result: npt.NDArray[np.float64] = np.where(np.isfinite(error), limited, -MAX_SQNR)
    return result
