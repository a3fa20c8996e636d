"""Statistics of every site's input, streamed while the float reference samples pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .artifacts import CalibrationError
from .denoiser import Denoiser

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
HISTOGRAM_BINS = 2048
HISTOGRAM_ROWS = 128
"""About how many rows of a site each network call adds to the histogram, evenly spaced; the range is from all rows."""
BATCH = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteStatistics:
    """What one site's input looked like.

    Args:
        timesteps: float64[T], strictly decreasing as sampled.
        low, high: float32[T, K], the least and greatest value of each channel at each timestep.
        mean: float32[T, K].
        rows: float32[R, K], rows kept to measure the output error of a choice, and row_step: int64[R], each row's index
            into `timesteps`.
    """

    timesteps: npt.NDArray[np.float64]
    low: Float32
    high: Float32
    mean: Float32
    rows: Float32
    row_step: npt.NDArray[np.int64]

    def amax(self, in_scale: Float32, in_shift: Float32) -> Float32:
        """float32[T]: max |(x - in_shift) / in_scale| at each timestep. Exactness: exact, from the channels' extremes."""
        extreme = np.maximum(np.abs(self.high - in_shift), np.abs(self.low - in_shift))
        return np.asarray((extreme / in_scale).max(axis=1), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which pictures calibration samples: `calib_size` of them, labels in turn, from one seed."""

    calib_size: int
    steps: int
    seed: int
    guidance: float
    classes: int

    @property
    def calls(self) -> int:
        """Network calls in all."""
        return self.steps * -(-self.calib_size // BATCH)

    def batches(self) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
        """(labels, seed) of each batch. The pictures do not depend on how many are asked for after them."""
        labels = np.arange(self.calib_size, dtype=np.int64) % self.classes
        for start in range(0, self.calib_size, BATCH):
            yield labels[start : start + BATCH], self.seed + start


class _RangeSum:
    """Running extremes and sums of one site; its size grows with the timesteps' number but not with the samples'."""

    def __init__(self) -> None:
        self.low: dict[float, torch.Tensor] = {}
        self.high: dict[float, torch.Tensor] = {}
        self.total: dict[float, torch.Tensor] = {}
        self.count: dict[float, int] = {}
        self.rows: list[torch.Tensor] = []
        self.row_timestep: list[float] = []

    def add(self, timestep: float, value: torch.Tensor, chosen: torch.Tensor) -> None:
        import torch

        low, high = torch.aminmax(value, dim=0)
        total = value.sum(0).double()
        if timestep in self.low:
            low = torch.minimum(low, self.low[timestep])
            high = torch.maximum(high, self.high[timestep])
            total = total + self.total[timestep]
        self.low[timestep], self.high[timestep], self.total[timestep] = low, high, total
        self.count[timestep] = self.count.get(timestep, 0) + len(value)
        self.rows.append(value[chosen].clone())
        self.row_timestep += [timestep] * len(chosen)

    def statistics(self) -> SiteStatistics:
        import torch

        steps = list(self.low)
        index = {timestep: i for i, timestep in enumerate(steps)}
        mean = torch.stack([self.total[t] / self.count[t] for t in steps])
        return SiteStatistics(
            timesteps=np.asarray(steps, dtype=np.float64),
            low=torch.stack([self.low[t] for t in steps]).numpy(),
            high=torch.stack([self.high[t] for t in steps]).numpy(),
            mean=mean.float().numpy(),
            rows=torch.cat(self.rows).numpy(),
            row_step=np.asarray([index[t] for t in self.row_timestep], dtype=np.int64),
        )


def collect_ranges(
    denoiser: Denoiser, sites: tuple[str, ...], sampling: Sampling, progress: Progress, rows_kept: int = 512
) -> dict[str, SiteStatistics]:
    """Statistics by site. Memory: 3 float32[T, K] and `rows_kept` rows a site, whatever the number of samples.

    Args:
        sites: names of the sites to watch.
        progress: called with (network calls done, network calls in all).
        rows_kept: about how many rows of each site are kept, spread evenly over batches and timesteps.

    Raises:
        CalibrationError: an input with NaN or Inf, or one that is zero throughout.
    """
    import torch

    sums = {name: _RangeSum() for name in sites}
    each = max(1, rows_kept // sampling.calls)
    random = torch.Generator().manual_seed(sampling.seed)

    def collect(name: str, timestep: float, value: torch.Tensor) -> None:
        if name in sums:
            sums[name].add(timestep, value, torch.randint(len(value), (each,), generator=random))

    _run(denoiser, sampling, collect, progress)
    result = {name: item.statistics() for name, item in sums.items()}
    _check(result)
    return result


def collect_histograms(
    denoiser: Denoiser,
    transforms: dict[str, tuple[Float32, Float32]],
    amax: dict[str, Float32],
    sampling: Sampling,
    progress: Progress,
) -> dict[str, npt.NDArray[np.int64]]:
    """int64[T, 2048] by site: counts of |(x - in_shift) / in_scale| in equal cells of [0, amax[t]], for each timestep.

    A second run over the same pictures: clipping acts on the scaled input, and the scaling was chosen from the first.

    Args:
        transforms: (in_scale, in_shift) by site.
        amax: float32[T] by site, as `SiteStatistics.amax` of the same transform gives it.
    """
    import torch

    counts = {name: np.zeros((len(limit), HISTOGRAM_BINS), dtype=np.int64) for name, limit in amax.items()}
    tensors = {
        name: (torch.from_numpy(1.0 / in_scale), torch.from_numpy(in_shift.copy()))
        for name, (in_scale, in_shift) in transforms.items()
    }
    step_of: dict[float, int] = {}

    def collect(name: str, timestep: float, value: torch.Tensor) -> None:
        if name in tensors:
            step = step_of.setdefault(timestep, len(step_of))
            inverse, in_shift = tensors[name]
            limit = float(amax[name][step])
            rows = value[:: max(1, len(value) // HISTOGRAM_ROWS)]
            scaled = ((rows - in_shift) * inverse).abs_().clamp_(max=limit)
            counts[name][step] += torch.histc(scaled, HISTOGRAM_BINS, 0.0, limit or 1.0).numpy().astype(np.int64)

    _run(denoiser, sampling, collect, progress)
    return counts


def _run(
    denoiser: Denoiser,
    sampling: Sampling,
    collect: Callable[[str, float, torch.Tensor], None],
    progress: Progress,
) -> None:
    """Sample every batch; hand each site's input to `collect` with its name and timestep, as it passes."""
    current = float("nan")
    with denoiser.observe(lambda name, value: collect(name, current, value)):
        done = 0
        for labels, seed in sampling.batches():
            for timestep in denoiser.trajectory(labels, steps=sampling.steps, seed=seed, guidance=sampling.guidance):
                progress(done, sampling.calls)
                current, done = timestep, done + 1
        progress(done, sampling.calls)


def _check(statistics: dict[str, SiteStatistics]) -> None:
    wrong = []
    for name, item in statistics.items():
        finite = np.isfinite(item.low).all(axis=1) & np.isfinite(item.high).all(axis=1)
        if not finite.all():
            step = int(finite.argmin())
            wrong.append(f"the input of '{name}' has NaN or Inf at timestep {item.timesteps[step]:g}; check the checkpoint")
        elif not (item.low.any() or item.high.any()):
            wrong.append(f"the input of '{name}' is zero at every timestep, so it has no scale; exclude it: --exclude '{name}'")
    if wrong:
        raise CalibrationError("\n".join(wrong))
