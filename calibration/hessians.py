"""The second moments of every site's quantized input, which GPTQ rounds by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .artifacts import SitePlan
from .collect import Progress, Sampling, watch_calls
from .denoiser import Denoiser
from .group import ALONE, ProcessGroup

Float32 = npt.NDArray[np.float32]
IN_MEMORY = 1 << 30
"""Bytes of sums that are held at once; with more the same pictures are sampled again."""
ROWS = 256
"""At most so many rows of a site count at each network call, evenly spaced."""
HEADROOM = 2.0**61
"""What the sum of all calls may reach of int64."""


def stream_hessians(
    denoiser: Denoiser,
    plans: Mapping[str, SitePlan],
    reach: Mapping[str, float],
    timesteps: Sequence[float],
    sampling: Sampling,
    progress: Progress,
    group: ProcessGroup = ALONE,
) -> Iterator[dict[str, Float32]]:
    """float32[K, K] by site: the mean of x x^T over the rows of x = the plan's quantized input. A few sites at a time.

    A further run over the same pictures for as many sites as fit in IN_MEMORY. Each call's sum is rounded to a whole
    multiple of 2^-61 of the most that all of them can reach, so the total does not depend on the order of the calls, nor
    on which process made them.

    Args:
        reach: max |x| of each.
        timesteps: the distinct ones of a trajectory, in order.
    """
    units = {name: HEADROOM / (sampling.calls * ROWS * reach[name] ** 2) for name in plans}
    for names in _batches({name: len(plan.in_scale) for name, plan in plans.items()}):
        yield _sum({name: plans[name] for name in names}, units, denoiser, timesteps, sampling, progress, group)


def _sum(
    plans: Mapping[str, SitePlan],
    units: Mapping[str, float],
    denoiser: Denoiser,
    timesteps: Sequence[float],
    sampling: Sampling,
    progress: Progress,
    group: ProcessGroup,
) -> dict[str, Float32]:
    sums = {name: np.zeros((len(plan.in_scale),) * 2, dtype=np.int64) for name, plan in plans.items()}
    rows = dict.fromkeys(plans, 0)

    def collect(record: int, name: str, value: Float32) -> None:
        if name not in plans:
            return
        chosen = value[:: -(-len(value) // ROWS)]
        quantized = plans[name].quantized(chosen, timesteps[record])
        product = (quantized.T @ quantized).astype(np.float64)
        sums[name] += np.rint(product * units[name]).astype(np.int64)
        rows[name] += len(chosen)

    watch_calls(denoiser, sampling, collect, progress, group)
    found = {}
    for name in plans:
        total, count = group.total(sums[name]).astype(np.float64), int(group.total(np.asarray([rows[name]]))[0])
        found[name] = (total / (units[name] * count)).astype(np.float32)
    return found


def _batches(widths: Mapping[str, int]) -> list[list[str]]:
    """Names in order, as many together as fit in memory."""
    batches: list[list[str]] = []
    size = IN_MEMORY + 1
    for name, width in widths.items():
        size += 8 * width**2
        if size > IN_MEMORY:
            batches.append([])
            size = 8 * width**2
        batches[-1].append(name)
    return batches
