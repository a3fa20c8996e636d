"""Merging calibrated timesteps into bins: an explicit, optimal 1-D partition."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from dq_export.core.qtypes import INT8, QuantType
from dq_export.core.scales import ScaleTable, TimestepBins

Float64 = npt.NDArray[np.float64]
TOLERANCE = 0.05


def partition(scale: npt.NDArray[np.float32], bins: int | Literal["auto", "per-step"]) -> list[int]:
    """Start index of each bin over scales in timestep order, with the least noise added by merging.

    A bin takes the largest scale S of its steps; a step whose own scale is s then has (S / s)^2 times the rounding
    noise. The cost of a bin is the sum of (S / s)^2 - 1 over its steps. Dynamic programming finds the partition of least
    total cost in O(T^2 * bins).

    Args:
        scale: float32[T], > 0, ordered by timestep.
        bins: the number of bins (at most T); `auto`: the fewest whose mean added noise is at most 5 % (0.2 dB);
            `per-step`: T.
    """
    steps = len(scale)
    limit = steps if isinstance(bins, str) else min(bins, steps)
    if bins == "per-step":
        return list(range(steps))
    cost = _merge_costs(scale.astype(np.float64))
    best = cost[0].copy()
    starts = [np.zeros(steps, dtype=np.int64)]
    while len(starts) < limit and not (bins == "auto" and best[-1] <= TOLERANCE * steps):
        # best[j]: least cost of steps 0..j in len(starts) bins; one more bin starts at i <= j.
        through = np.concatenate(([np.inf], best[:-1]))[:, None] + cost
        starts.append(through.argmin(axis=0))
        best = through.min(axis=0)
    result: list[int] = []
    end = steps - 1
    for start in reversed(starts):
        result.append(int(start[end]))
        end = int(start[end]) - 1
        if end < 0:
            break
    return sorted(result)


def build_table(
    timesteps: Float64, scale: npt.NDArray[np.float32], bins: int | Literal["auto", "per-step"], qtype: QuantType = INT8
) -> ScaleTable:
    """The scale table of one site. Edges lie half way between neighbouring calibrated timesteps, rounded to float32, the
    type in which the graph compares.

    Args:
        timesteps: float64[T], distinct, any order.
        scale: float32[T], each timestep's own scale; zeros (the input is zero at that timestep) are replaced by the least
            positive scale.
    """
    order = np.argsort(timesteps)
    ordered, value = timesteps[order], scale[order]
    value = np.where(value > 0, value, value[value > 0].min())
    starts = partition(value, bins)
    merged = [value[a:b].max() for a, b in zip(starts, [*starts[1:], len(value)], strict=True)]
    return ScaleTable(scale=np.asarray(merged, dtype=np.float32), bins=_between(ordered, starts), qtype=qtype)


def given_table(timesteps: Float64, scale: npt.NDArray[np.float32], qtype: QuantType) -> ScaleTable:
    """The table of imported scales: a bin for each timestep, where neighbours with equal scales share one. Edges as in
    `build_table`.

    Args:
        timesteps: float64[T], ascending, distinct in float32.
        scale: float32[T], > 0.
    """
    starts = [0, *(np.flatnonzero(np.diff(scale)) + 1).tolist()]
    return ScaleTable(scale=scale[starts], bins=_between(timesteps, starts), qtype=qtype)


def _between(ordered: Float64, starts: list[int]) -> TimestepBins:
    """The bins that start at the given indices into the timesteps."""
    return TimestepBins(edges=tuple(float(np.float32((ordered[i - 1] + ordered[i]) / 2)) for i in starts[1:]))


def _merge_costs(scale: Float64) -> Float64:
    """float64[T, T]: the cost of one bin over steps i..j (inf for j < i)."""
    steps = len(scale)
    cost = np.full((steps, steps), np.inf)
    for i in range(steps):
        largest = np.maximum.accumulate(scale[i:])
        count = np.arange(1, steps - i + 1)
        # Summed from i on: in the difference of two sums from 0 on, the large terms of tiny scales before i would cancel badly.
        cost[i, i:] = np.maximum(largest**2 * np.cumsum(scale[i:] ** -2) - count, 0.0)
    return cost
