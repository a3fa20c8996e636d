"""The second moments of every site's quantized input, for GPTQ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from dq_export.core.artifacts import SitePlan
from dq_export.core.network import Linear
from dq_export.core.patches import Patches

from .collect.calls import Call, Calls
from .collect.rows import spread
from .parallel import threads_for

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
SPACE = 1 << 30
"""Default for the bytes of sums that are in memory at once."""
ROWS = 256
"""The greatest number of rows of a site that each network call contributes; see `spread`."""
HEADROOM = 2.0**61
"""The bound of the sum of all calls, inside the range of int64."""
PATCH = 6144
"""The greatest number of inputs of a convolution for which products of pairs are summed: 640 channels of 3 x 3. A convolution
of 2560 channels would take 4 GB twice."""
TILE = 64
"""Rows of a sum that are computed at once: few enough to fit in a core's cache."""


@dataclass(frozen=True, eq=False)
class Moments:
    """The mean of x x^T over the rows of a site's quantized input, or only its diagonal, the mean of x^2.

    Args:
        tiles: the upper triangle, half of the memory: for each TILE rows of it, what stands from the diagonal on,
            float32[rows, K - first]. One float32[K] for the diagonal.
    """

    tiles: tuple[Float32, ...]

    def whole(self) -> Float32:
        """float32[K, K], symmetric; of a diagonal float32[K]."""
        first = self.tiles[0]
        if first.ndim == 1:
            return first
        matrix = np.empty((first.shape[1],) * 2, dtype=np.float32)
        for index, values in enumerate(self.tiles):
            start = index * TILE
            tile = slice(start, start + TILE)
            matrix[tile, start:] = values
            matrix[tile, tile] = np.triu(matrix[tile, tile])
            matrix[tile, tile] += np.triu(matrix[tile, tile], 1).T
            matrix[start:, tile] = matrix[tile, start:].T
        return matrix


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
) -> Iterator[dict[str, Moments]]:
    """The second moments of each site's quantized input. Yields a few sites at a time. For convolutions with large patches only
    the diagonal; see `pairs_of`.

    Each part takes another run over the same pictures, for as many sites as fit in `space`. Each call's sum is rounded to a
    whole multiple of 2^-61 of the greatest possible total, so the total depends neither on the order of the calls nor on the
    process that computed them.

    Args:
        reach: max |x| by site.
        timesteps: the distinct timesteps of a trajectory, in order.
        space: bytes of sums that are in memory at once; at least one site is.
        diagonal: whether to sum only x^2.
    """
    units = {name: HEADROOM / (calls.sampling.calls * ROWS * reach[name] ** 2) for name in plans}
    linears = calls.denoiser.linears
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, plan in plans.items():
        width, pairs = len(plan.in_scale), not diagonal and pairs_of(linears[plan.site.linears[0]])
        shapes[name] = [(min(TILE, width - start), width - start) for start in range(0, width, TILE)] if pairs else [(width,)]
    for names in _batches(shapes, space):
        sums = {name: [np.zeros(shape, dtype=np.int64) for shape in shapes[name]] for name in names}
        yield _fill(calls, sums, plans, units, timesteps)


def _fill(
    calls: Calls,
    sums: dict[str, list[Int64]],
    plans: Mapping[str, SitePlan],
    units: Mapping[str, float],
    timesteps: Sequence[float],
) -> dict[str, Moments]:
    names = list(sums)
    rows = dict.fromkeys(names, 0)
    widest = 20 * TILE * max(tiles[0].shape[-1] for tiles in sums.values())  # bytes: a product in float32, float64 and int64
    libraries, pool = ThreadpoolController(), ThreadPoolExecutor(threads_for(widest))

    def collect(call: Call, name: str, value: torch.Tensor | Patches) -> None:
        if name not in sums:
            return
        chosen = value[spread(len(value), ROWS)].cpu().numpy()
        quantized = plans[name].quantized(chosen, timesteps[call.record])
        tiles = sums[name]
        if tiles[0].ndim == 1:
            tiles[0] += np.rint(np.square(quantized).sum(axis=0, dtype=np.float64) * units[name]).astype(np.int64)
        else:
            add = partial(_add, tiles, quantized, units[name])
            # Each tile has one thread: the way in which a library splits a product among threads changes the order of its sums.
            with libraries.limit(limits=1, user_api="blas"):
                list(pool.map(add, range(len(tiles))))
        rows[name] += len(chosen)

    with pool:
        calls.watch(collect)
    moments = {}
    for name in names:
        count = int(calls.group.total(np.asarray([rows[name]]))[0])
        unit, tiles = 1 / (units[name] * count), sums.pop(name)[::-1]
        means: list[Float32] = []
        while tiles:  # each is freed before the next is converted
            means.append((calls.group.total(tiles.pop()).astype(np.int64, copy=False) * unit).astype(np.float32))
        moments[name] = Moments(tuple(means))
    return moments


def _add(tiles: Sequence[Int64], rows: Float32, unit: float, index: int) -> None:
    """Add one tile of rows.T @ rows, from the diagonal on, rounded to whole multiples of 1 / unit."""
    start = index * TILE
    product = np.multiply(rows[:, start : start + TILE].T @ rows[:, start:], unit, dtype=np.float64)
    tiles[index][:] += np.rint(product, out=product).astype(np.int64)


def _batches(shapes: Mapping[str, Sequence[tuple[int, ...]]], space: int) -> list[list[str]]:
    """The names in order, in groups that fit in memory."""
    batches: list[list[str]] = []
    size = space + 1
    for name, tiles in shapes.items():
        needed = 8 * sum(math.prod(shape) for shape in tiles)
        size += needed
        if size > space:
            batches.append([])
            size = needed
        batches[-1].append(name)
    return batches
