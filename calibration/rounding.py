"""Rounding of weights: from a weight and what its inputs look like to codes. `ROUNDINGS` names the ways."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .grid import WeightGrid, cover, fit
from .recipe import Rule

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""
COLUMNS = 128
"""Columns between two updates of all columns behind them."""


def rtn(weight: Float32, rule: Rule, hessian: Float32 | None) -> tuple[WeightGrid, Float32 | None]:
    """The covering grid, codes to nearest."""
    return cover(weight, rule), None


def mse(weight: Float32, rule: Rule, hessian: Float32 | None) -> tuple[WeightGrid, Float32 | None]:
    """The grid of least error, inputs counted by their mean square; codes to nearest."""
    return fit(weight, rule, None if hessian is None else np.diagonal(hessian).copy()), None


def gptq(weight: Float32, rule: Rule, hessian: Float32 | None) -> tuple[WeightGrid, Float32 | None]:
    """The grid of `mse`, and codes that make up for each other's errors; as `mse` where there is no Hessian."""
    grid = mse(weight, rule, hessian)[0]
    return grid, None if hessian is None else compensate(weight, grid, hessian)


ROUNDINGS: dict[str, Callable[[Float32, Rule, Float32 | None], tuple[WeightGrid, Float32 | None]]] = {
    "rtn": rtn,
    "mse": mse,
    "gptq": gptq,
}
"""By name: (weight float32[out, K], rule, Hessian float32[K, K] or None) -> (grid, codes float32[out, K]; None: the nearest)."""


def compensate(weight: Float32, grid: WeightGrid, hessian: Float32) -> Float32:
    """float32[out, K]: codes, column after column, each column's error made up for by those not rounded yet.

    Columns go in the order of falling Hessian diagonal (act-order); the grid is fixed before, so blocks stay where they are.
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
    upper = _inverse_factor(hessian[np.ix_(order, order)].astype(np.float64))
    left = np.where(np.diagonal(hessian) > 0, weight, 0.0)[:, order].astype(np.float32)
    steps = np.broadcast_to(grid.steps(width), weight.shape)[:, order]
    codes = np.empty_like(left)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        errors = np.empty((len(weight), stop - start), dtype=np.float32)
        for column in range(start, stop):
            value, step = left[:, column], steps[:, column]
            codes[:, column] = grid.qtype.round(value / step)
            error = (value - codes[:, column] * step) / upper[column, column]
            left[:, column + 1 : stop] -= np.outer(error, upper[column, column + 1 : stop])
            errors[:, column - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    found = np.empty_like(codes)
    found[:, order] = codes
    return found


def _inverse_factor(hessian: Float64) -> Float32:
    """Upper Cholesky factor of the damped Hessian's inverse."""
    diagonal = np.diagonal(hessian).copy()
    mean = diagonal.mean() or 1.0
    damped = hessian + np.diag(np.where(diagonal > 0, DAMPING * mean, mean))
    factor: Float32 = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return factor
