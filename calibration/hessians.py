"""The second moments of every site's quantized input, for GPTQ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

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
Number = TypeVar("Number", bound=np.generic)
SPACE = 1 << 30
"""Default for the bytes of sums that are in memory at once."""
ROWS = 256
"""The greatest number of rows of a site that a network call contributes; see `spread`."""
CALLS = 256
"""About the greatest number of network calls that contribute. Summing takes longer than a call of a large network on a GPU, and
this many contribute 14 rows for each of the 4,608 inputs of DiT-XL/2's widest linear."""
HEADROOM = 2.0**61
"""The bound of the sum of all calls, inside the range of int64."""
PATCH = 6144
"""The greatest number of inputs of a convolution for which products of pairs are summed: 640 channels of 3 x 3. A convolution
of 2560 channels would take 4 GB twice."""
TILE = 64
"""Rows of a sum that are computed at once: few enough to fit in a core's cache."""
PIECE = 1 << 20
"""Sums that become float32 at once."""


@dataclass(frozen=True, eq=False)
class Moments:
    """The mean of x x^T over the rows of a site's quantized input, or only its diagonal, the mean of x^2.

    Args:
        values: float32[K], the diagonal; or of the matrix the tiles of its upper triangle one after the other, half of its
            memory: see `tiles_of`.
        width: K.
        pairs: whether it is the matrix.
    """

    values: Float32
    width: int
    pairs: bool

    def whole(self) -> Float32:
        """float32[K, K], symmetric; of a diagonal float32[K]."""
        if not self.pairs:
            return self.values
        matrix = np.empty((self.width, self.width), dtype=np.float32)
        for index, values in enumerate(tiles_of(self.values, self.width)):
            start = index * TILE
            tile = slice(start, start + TILE)
            matrix[tile, start:] = values
            matrix[tile, tile] = np.triu(matrix[tile, tile])
            matrix[tile, tile] += np.triu(matrix[tile, tile], 1).T
            matrix[start:, tile] = matrix[tile, start:].T
        return matrix


def tiles_of(values: npt.NDArray[Number], width: int) -> list[npt.NDArray[Number]]:
    """Views [rows, width - first] of an array that holds, for each TILE rows of a matrix, what stands from the diagonal on."""
    shapes = _tile_shapes(width)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]


def _tile_shapes(width: int) -> list[tuple[int, int]]:
    return [(min(TILE, width - first), width - first) for first in range(0, width, TILE)]


def _size(width: int, pairs: bool) -> int:
    """The number of values of `Moments`."""
    return sum(map(math.prod, _tile_shapes(width))) if pairs else width


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
    pairs = {name: not diagonal and pairs_of(linears[plan.site.linears[0]]) for name, plan in plans.items()}
    sizes = {name: _size(len(plan.in_scale), pairs[name]) for name, plan in plans.items()}
    for names in _batches(sizes, space):
        # One array a site: memory of large arrays goes back to the system when they are freed, that of tiles does not.
        sums = {name: np.zeros(sizes[name], dtype=np.int64) for name in names}
        rows = _fill(calls, sums, pairs, plans, units, timesteps)
        moments = {}
        for name in names:
            unit, width = 1 / (units[name] * rows[name]), len(plans[name].in_scale)
            total = calls.group.total(sums.pop(name)).astype(np.int64, copy=False)
            moments[name] = Moments(_scaled(total, unit), width, pairs[name])
        yield moments


def _fill(
    calls: Calls,
    sums: Mapping[str, Int64],
    pairs: Mapping[str, bool],
    plans: Mapping[str, SitePlan],
    units: Mapping[str, float],
    timesteps: Sequence[float],
) -> dict[str, int]:
    """Run over the pictures and add up; the number of rows of each site."""
    rows = dict.fromkeys(sums, 0)
    tiles = {name: tiles_of(total, len(plans[name].in_scale)) for name, total in sums.items() if pairs[name]}
    widest = max((len(plans[name].in_scale) for name in sums), default=0)
    work = 20 * TILE * widest  # bytes: a product in float32, float64 and int64
    stride = -(-calls.sampling.calls // CALLS)
    libraries, pool = ThreadpoolController(), ThreadPoolExecutor(threads_for(work))

    def collect(call: Call, name: str, value: torch.Tensor | Patches) -> None:
        if name not in sums or not call.contributes(stride):
            return
        chosen = value[spread(len(value), ROWS)].cpu().numpy()
        quantized = plans[name].quantized(chosen, timesteps[call.record])
        if not pairs[name]:
            sums[name][:] += np.rint(np.square(quantized).sum(axis=0, dtype=np.float64) * units[name]).astype(np.int64)
        else:
            add = partial(_add, tiles[name], quantized, units[name])
            # Each tile has one thread: the way in which a library splits a product among threads changes the order of its sums.
            with libraries.limit(limits=1, user_api="blas"):
                list(pool.map(add, range(len(tiles[name]))))
        rows[name] += len(chosen)

    with pool:
        calls.watch(collect)
    return {name: int(calls.group.total(np.asarray([count]))[0]) for name, count in rows.items()}


def _scaled(total: Int64, unit: float) -> Float32:
    """float32 of whole multiples of `unit`, a piece at a time."""
    values = np.empty(total.shape, dtype=np.float32)
    for start in range(0, total.size, PIECE):
        values[start : start + PIECE] = total[start : start + PIECE] * unit
    return values


def _add(tiles: Sequence[Int64], rows: Float32, unit: float, index: int) -> None:
    """Add one tile of rows.T @ rows, from the diagonal on, rounded to whole multiples of 1 / unit."""
    start = index * TILE
    product = np.multiply(rows[:, start : start + TILE].T @ rows[:, start:], unit, dtype=np.float64)
    tiles[index][:] += np.rint(product, out=product).astype(np.int64)


def _batches(sizes: Mapping[str, int], space: int) -> list[list[str]]:
    """The names in order, in groups that fit in memory."""
    batches: list[list[str]] = []
    needed = space + 1
    for name, size in sizes.items():
        needed += 8 * size
        if needed > space:
            batches.append([])
            needed = 8 * size
        batches[-1].append(name)
    return batches
