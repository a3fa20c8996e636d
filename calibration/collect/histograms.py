"""Histograms of every site's scaled input, by timestep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dq_export.core.patches import Patches

from .calls import Call, Calls
from .records import RecordFile, merge
from .rows import spread

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
HISTOGRAM_BINS = 2048
HISTOGRAM_ROWS = 128
"""The greatest number of rows of a site that each network call adds to the histogram, see `spread`; the range covers all rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Histograms(Mapping[str, npt.NDArray[np.int64]]):
    """int64[T, 2048] by site; read from disk at each access."""

    steps: int
    counts: RecordFile

    def __getitem__(self, name: str) -> npt.NDArray[np.int64]:
        if name not in self.counts.sizes:
            raise KeyError(name)
        return np.stack([self.counts.read(step, name) for step in range(self.steps)]).astype(np.int64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts.sizes)

    def __len__(self) -> int:
        return len(self.counts.sizes)


def collect_histograms(
    calls: Calls, transforms: Mapping[str, tuple[Float32, Float32]], amax: Mapping[str, Float32], folder: Path
) -> Histograms:
    """int64[T, 2048] by site: counts of |(x - in_shift) / in_scale| in equal cells of [0, amax[t]], for each timestep.

    This is a second run over the same pictures: clipping acts on the scaled input, and the first run chose the scaling.
    The counts lie in `folder`; they are integers, so their sum is the same for any number of processes.

    Args:
        transforms: (in_scale, in_shift) by site.
        amax: float32[T] by site, from `SiteStatistics.amax` of the same transform.
    """
    import torch

    group = calls.group
    steps = len(next(iter(amax.values())))
    counts = RecordFile(folder / f"histograms.{group.rank}", dict.fromkeys(amax, HISTOGRAM_BINS), np.int64)
    for step in range(steps):
        counts.write_record(step, np.zeros(HISTOGRAM_BINS * len(amax), dtype=np.int64))
    tensors = {
        name: (torch.from_numpy(1.0 / in_scale), torch.from_numpy(in_shift.copy()))
        for name, (in_scale, in_shift) in transforms.items()
    }

    def collect(call: Call, name: str, value: torch.Tensor | Patches) -> None:
        if name in tensors:
            inverse, in_shift = (tensor.to(value.device) for tensor in tensors[name])
            limit = float(amax[name][call.record])
            rows = value[spread(len(value), HISTOGRAM_ROWS)]
            scaled = ((rows - in_shift) * inverse).abs_().clamp_(max=limit)
            counted = torch.histc(scaled, HISTOGRAM_BINS, 0.0, limit or 1.0).cpu().numpy().astype(np.int64)
            counts.write(call.record, name, counts.read(call.record, name) + counted)

    calls.watch(collect)
    if group.size > 1:
        merge(counts, [True] * steps, group.total, 0)
    return Histograms(steps=steps, counts=counts)
