"""The second moments of every site's quantized input, for GPTQ."""

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
"""Default for the bytes of sums that are in memory at once."""
ROWS = 256
"""The greatest number of rows of a site that each network call contributes, evenly spaced."""
HEADROOM = 2.0**61
"""The bound of the sum of all calls, inside the range of int64."""
PATCH = 6144
"""The greatest number of inputs of a convolution for which products of pairs are summed: 640 channels of 3 x 3. A convolution
of 2560 channels would take 4 GB twice."""
TILE = 64
"""Rows of a sum that are computed at once: few enough to fit in a core's cache."""


def pairs_of(linear: Linear) -> bool:
    """Whether products of pairs of its inputs are summed."""
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
    """For each site float32[K, K]: the mean of x x^T over the rows of x, the plan's quantized input. Yields a few sites at a
    time. For convolutions with large patches float32[K], the mean of x^2; see `pairs_of`.

    Each part takes another run over the same pictures, for as many sites as fit in `space`. Each call's sum is rounded to a
    whole multiple of 2^-61 of the greatest possible total, so the total depends neither on the order of the calls nor on the
    process that computed them.

    Args:
        reach: max |x| by site.
        timesteps: the distinct timesteps of a trajectory, in order.
        space: bytes of sums that are in memory at once; at least one site is.
        diagonal: whether to sum only x^2, float32[K].
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
            # Each tile has one thread: the way in which a library splits a product among threads changes the order of its sums.
            with libraries.limit(limits=1, user_api="blas"):
                list(pool.map(add, range(0, len(sums[name]), TILE)))
        rows[name] += len(chosen)

    with pool:
        calls.watch(collect)
    moments = {}
    for name in names:
        total = calls.group.total(sums.pop(name)).astype(np.int64, copy=False)
        count = int(calls.group.total(np.asarray([rows[name]]))[0])
        unit = 1 / (units[name] * count)
        moments[name] = (total * unit).astype(np.float32) if total.ndim == 1 else _symmetric(total, unit)
    return moments


def _add(total: npt.NDArray[np.int64], rows: Float32, unit: float, start: int) -> None:
    """Add one tile of rows.T @ rows, from the diagonal on, rounded to whole multiples of 1 / unit."""
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
    """The names in order, in groups that fit in memory."""
    batches: list[list[str]] = []
    size = space + 1
    for name, shape in shapes.items():
        size += 8 * math.prod(shape)
        if size > space:
            batches.append([])
            size = 8 * math.prod(shape)
        batches[-1].append(name)
    return batches
