"""The second moments of every site's quantized input, which GPTQ rounds by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from dq_export.core.artifacts import SitePlan
from dq_export.core.network import Linear
from dq_export.core.patches import Patches

from .collect.calls import Call, Calls
from .parallel import threads_for

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
SPACE = 1 << 30
"""Bytes of sums that are held at once, where nobody says otherwise."""
ROWS = 256
"""At most so many rows of a site count at each network call, evenly spaced."""
HEADROOM = 2.0**61
"""What the sum of all calls may reach of int64."""
PATCH = 6144
"""Inputs of a convolution up to which pairs of them are summed: 640 channels of 3 x 3. One of 2560 would take 4 GB, twice."""
TILE = 64
"""Rows of a sum that are made at once: few enough to stay in a core's cache."""


def pairs_of(linear: Linear) -> bool:
    """Whether the moments of pairs of its inputs are summed."""
    return not linear.convolution or linear.width <= PATCH


def stream_hessians(
    calls: Calls,
    plans: Mapping[str, SitePlan],
    reach: Mapping[str, float],
    timesteps: Sequence[float],
    space: int,
    *,
    diagonal: bool = False,
) -> Iterator[dict[str, Float32]]:
    """float32[K, K] by site: the mean of x x^T over the rows of x = the plan's quantized input. A few sites at a time.
    float32[K], the mean of x^2, of convolutions whose patches are large; see `pairs_of`.

    A further run over the same pictures for as many sites as fit in `space`. Each call's sum is rounded to a whole
    multiple of 2^-61 of the most that all of them can reach, so the total does not depend on the order of the calls, nor
    on which process made them.

    Args:
        reach: max |x| of each.
        timesteps: the distinct ones of a trajectory, in order.
        space: bytes of sums that are held at once; one site at the least.
        diagonal: only the mean of x^2, float32[K].
    """
    units = {name: HEADROOM / (calls.sampling.calls * ROWS * reach[name] ** 2) for name in plans}
    linears = calls.denoiser.linears
    alone = {name for name, plan in plans.items() if diagonal or not pairs_of(linears[plan.site.linears[0]])}
    shapes = {name: (len(plan.in_scale),) * (1 if name in alone else 2) for name, plan in plans.items()}
    for names in _batches(shapes, space):
        sums = {name: np.zeros(shapes[name], dtype=np.int64) for name in names}
        yield _fill(calls, sums, plans, units, timesteps)


def _fill(
    calls: Calls,
    sums: dict[str, npt.NDArray[np.int64]],
    plans: Mapping[str, SitePlan],
    units: Mapping[str, float],
    timesteps: Sequence[float],
) -> dict[str, Float32]:
    names = list(sums)
    rows = dict.fromkeys(names, 0)
    tile = 20 * TILE * max(len(total) for total in sums.values())  # bytes: a product in float32, float64 and int64
    libraries, pool = ThreadpoolController(), ThreadPoolExecutor(threads_for(tile))

    def collect(call: Call, name: str, value: torch.Tensor | Patches) -> None:
        if name not in sums:
            return
        chosen = value[:: -(-len(value) // ROWS)].cpu().numpy()
        quantized = plans[name].quantized(chosen, timesteps[call.record])
        if sums[name].ndim == 1:
            sums[name] += np.rint(np.square(quantized).sum(axis=0, dtype=np.float64) * units[name]).astype(np.int64)
        else:
            add = partial(_add, sums[name], quantized, units[name])
            # How a library shares one product among its threads changes the order of its sums, so each tile has one thread.
            with libraries.limit(limits=1, user_api="blas"):
                list(pool.map(add, range(0, len(sums[name]), TILE)))
        rows[name] += len(chosen)

    with pool:
        calls.watch(collect)
    found = {}
    for name in names:
        total = calls.group.total(sums.pop(name)).astype(np.int64, copy=False)
        count = int(calls.group.total(np.asarray([rows[name]]))[0])
        unit = 1 / (units[name] * count)
        found[name] = (total * unit).astype(np.float32) if total.ndim == 1 else _symmetric(total, unit)
    return found


def _add(total: npt.NDArray[np.int64], rows: Float32, unit: float, start: int) -> None:
    """Add some rows of rows.T @ rows, from the diagonal on, to the whole multiples of 1 / unit."""
    tile = slice(start, start + TILE)
    product = np.multiply(rows[:, tile].T @ rows[:, start:], unit, dtype=np.float64)
    total[tile, start:] += np.rint(product, out=product).astype(np.int64)


def _symmetric(total: npt.NDArray[np.int64], unit: float) -> Float32:
    """float32[K, K], from the upper triangle of whole multiples of `unit`."""
    whole = np.empty(total.shape, dtype=np.float32)
    for start in range(0, len(total), TILE):
        tile = slice(start, start + TILE)
        whole[tile, start:] = total[tile, start:] * unit
        whole[tile, tile] = np.triu(whole[tile, tile])
        whole[tile, tile] += np.triu(whole[tile, tile], 1).T
        whole[start:, tile] = whole[tile, start:].T
    return whole


def _batches(shapes: Mapping[str, tuple[int, ...]], space: int) -> list[list[str]]:
    """Names in order, as many together as fit in memory."""
    batches: list[list[str]] = []
    size = space + 1
    for name, shape in shapes.items():
        size += 8 * math.prod(shape)
        if size > space:
            batches.append([])
            size = 8 * math.prod(shape)
        batches[-1].append(name)
    return batches
