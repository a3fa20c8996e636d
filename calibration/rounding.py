"""Rounding of weights: from a weight and statistics of its inputs to codes. `ROUNDINGS` lists the methods."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dq_export.core.grid import WeightGrid, cover, fit
from dq_export.core.scheme import Scheme

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to the diagonal."""
COLUMNS = 128
"""Number of columns between two updates of all later columns."""
LEAF = 64
"""Largest triangle, in columns, that is inverted at once."""


def rtn(weight: Float32, scheme: Scheme, hessian: Float32 | None) -> tuple[WeightGrid, Float32 | None]:
    """The covering grid, codes to nearest."""
    return cover(weight, scheme), None


def mse(weight: Float32, scheme: Scheme, hessian: Float32 | None) -> tuple[WeightGrid, Float32 | None]:
    """The grid of least error, with inputs weighted by their mean square (the Hessian or only its diagonal); codes to nearest."""
    return fit(weight, scheme, hessian if hessian is None or hessian.ndim == 1 else np.diagonal(hessian).copy()), None


def gptq(weight: Float32, scheme: Scheme, hessian: Float32 | None) -> tuple[WeightGrid, Float32 | None]:
    """The grid of `mse`, and codes that compensate each other's errors; equal to `mse` without a Hessian, or with only its
    diagonal."""
    grid = mse(weight, scheme, hessian)[0]
    return grid, None if hessian is None or hessian.ndim == 1 else compensate(weight, grid, hessian)


Rounder = Callable[[Float32, Scheme, Float32 | None], tuple[WeightGrid, Float32 | None]]
"""(weight float32[out, K], scheme, Hessian float32[K, K] or None) -> (grid, codes float32[out, K]; None: nearest)."""
ROUNDINGS: dict[str, Rounder] = {
    "rtn": rtn,
    "mse": mse,
    "gptq": gptq,
}
"""By name."""


def compensate(weight: Float32, grid: WeightGrid, hessian: Float32) -> Float32:
    """float32[out, K]: codes, chosen column after column; columns not rounded yet compensate the error of each column.

    Columns are rounded in the order of decreasing Hessian diagonal (act-order). The grid is fixed before, so blocks do not
    change.
    An input that is always zero gets the code 0.

    Args:
        hessian: float32[K, K], the mean of x x^T over quantized inputs, or a user's own; symmetric, not negative.

    Source: GPTQ (arXiv 2210.17323) algorithm 1, with its published code's act-order and static groups.

    Raises:
        ValueError: the Hessian is not finite, or of another size.
    """
    width = weight.shape[1]
    if hessian.shape != (width, width) or not np.isfinite(hessian).all():
        raise ValueError(f"expected a finite Hessian [{width}, {width}], found {list(hessian.shape)}")
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    backwards = order[::-1]
    upper = _inverse_factor(hessian[np.ix_(backwards, backwards)].astype(np.float64))
    # From here on, input channels are rows, which makes each of them contiguous.
    left = np.where(np.diagonal(hessian) > 0, weight, 0.0).T[order].astype(np.float32)
    steps = np.broadcast_to(grid.steps(width), weight.shape).T[order]
    codes = np.empty_like(left)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        errors = np.empty((stop - start, len(weight)), dtype=np.float32)
        for column in range(start, stop):
            value, step = left[column], steps[column]
            codes[column] = grid.qtype.round(value / step)
            errors[column - start] = error = (value - codes[column] * step) / upper[column, column]
            left[column + 1 : stop] -= np.outer(upper[column, column + 1 : stop], error)
        left[stop:] -= upper[start:stop, stop:].T @ errors
    ordered = np.empty_like(weight)
    ordered[:, order] = codes.T
    return ordered


def _inverse_factor(hessian: Float64) -> Float32:
    """Upper Cholesky factor U of the damped Hessian's inverse, U^T U.

    H = R R^T with R upper triangular is the Cholesky factorization of H read backwards, and U = R^-1: a quarter of the
    work of inverting H and factorizing that.

    Args:
        hessian: H read backwards, from its last row and column to the first; it is overwritten.
    """
    diagonal = np.einsum("ii->i", hessian)
    mean = float(diagonal[::-1].copy().mean()) or 1.0
    diagonal += np.where(diagonal > 0, DAMPING * mean, mean)
    factor = np.linalg.cholesky(hessian).astype(np.float64, copy=False)[::-1, ::-1]
    _invert_upper(factor)
    return factor.astype(np.float32)


def _invert_upper(matrix: Float64) -> None:
    """The inverse of an upper triangular matrix, in place: [[A, B], [0, C]] -> [[A^-1, -A^-1 B C^-1], [0, C^-1]]."""
    half = len(matrix) // 2
    if len(matrix) <= LEAF:
        matrix[:] = np.linalg.inv(matrix)
        return
    first, last = matrix[:half, :half], matrix[half:, half:]
    _invert_upper(first)
    _invert_upper(last)
    matrix[:half, half:] = -first @ matrix[:half, half:] @ last
