"""Weights after the equivalent scalings of all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .artifacts import SitePlan
from .folds import ROWS, read_weight
from .network import Denoiser

Float32 = npt.NDArray[np.float32]
TEMPORARIES = 5
"""The greatest number of temporary arrays of a weight's size."""


def folded_weight(weight: Float32, linear: str, plans: Sequence[SitePlan]) -> Float32:
    """float32[out, in]: a linear's weight after every scaling that touches it: columns times the in_scale of its own
    input, rows divided by the in_scale of the inputs that it produces."""
    for plan in plans:
        if linear in plan.site.linears:
            weight = read_weight(weight, plan.in_scale).astype(np.float32, copy=False)
    for plan in plans:
        for part in plan.site.fold.rows_of(linear):
            weight = part.divided(weight, plan.channel_scale).astype(np.float32, copy=False)
    return weight


def row_factors(linear: str, outputs: int, plans: Sequence[SitePlan]) -> Float32:
    """float32[out]: the factors by which the scalings of its output's readers multiply a linear's rows."""
    producing = [plan for plan in plans if linear not in plan.site.linears]
    return folded_weight(np.ones((outputs, 1), dtype=np.float32), linear, producing)[:, 0]


def work_bytes(denoiser: Denoiser) -> int:
    """The greatest number of bytes for the work on one folded weight: those of the largest weight with its temporaries."""
    return TEMPORARIES * max(denoiser.weight(name).nbytes for name in denoiser.linears)


def touching_plans(plans: Mapping[str, SitePlan]) -> dict[str, list[SitePlan]]:
    """For each linear, the plans whose scaling is folded into its weight."""
    touching: dict[str, list[SitePlan]] = {}
    for plan in plans.values():
        producers = (part.name for part in plan.site.fold.parts if part.kind in ROWS)
        for name in {*plan.site.linears, *producers}:
            touching.setdefault(name, []).append(plan)
    return touching
