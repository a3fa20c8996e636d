"""Statistics of every site's input, collected on disk while the float reference samples pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationError
from dq_export.core.patches import Patches

from .calls import Call, Calls
from .journal import Journal
from .records import RecordFile, merge

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
ROWS_KEPT = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteStatistics:
    """Statistics of one site's input.

    Args:
        timesteps: float64[T], in the order of sampling.
        low, high: float32[T, K], the least and greatest value of each channel at each timestep.
        rows: float32[R, K], rows that are kept to measure output errors, and row_step: int64[R], each row's index into
            `timesteps`.
    """

    timesteps: npt.NDArray[np.float64]
    low: Float32
    high: Float32
    rows: Float32
    row_step: npt.NDArray[np.int64]

    def joined(self, other: SiteStatistics) -> SiteStatistics:
        """The statistics of two tensors that share a scaling."""
        return SiteStatistics(
            timesteps=self.timesteps,
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            rows=np.concatenate([self.rows, other.rows]),
            row_step=np.concatenate([self.row_step, other.row_step]),
        )

    def amax(self, in_scale: Float32, in_shift: Float32) -> Float32:
        """float32[T]: max |(x - in_shift) / in_scale| at each timestep. Exactness: exact, from the channels' extremes."""
        extreme = np.maximum(np.abs(self.high - in_shift), np.abs(self.low - in_shift))
        return np.asarray((extreme / in_scale).max(axis=1), dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics(Mapping[str, SiteStatistics]):
    """The statistics of all sites, by name; read from disk at each access."""

    timesteps: npt.NDArray[np.float64]
    row_step: npt.NDArray[np.int64]
    records: int
    ranges: RecordFile
    rows: RecordFile

    def __getitem__(self, name: str) -> SiteStatistics:
        if name not in self.ranges.sizes:
            raise KeyError(name)
        steps = len(self.timesteps)
        both = np.stack([self.ranges.read(step, name) for step in range(steps)]).reshape(steps, 2, -1)
        rows = [self.rows.read(i, name) for i in range(self.records)]
        samples = np.concatenate(rows).reshape(-1, both.shape[2])
        return SiteStatistics(timesteps=self.timesteps, low=-both[:, 0], high=both[:, 1], rows=samples, row_step=self.row_step)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranges.sizes)

    def __len__(self) -> int:
        return len(self.ranges.sizes)


def collect_ranges(calls: Calls, sites: tuple[str, ...], folder: Path, rows_kept: int = ROWS_KEPT) -> Statistics:
    """Statistics by site. They lie in `folder`: memory grows neither with the pictures nor with the timesteps.

    A run that ends early leaves its finished batches there, and a later call with the same arguments continues after
    them. One process samples each batch; extremes and kept rows do not depend on the order, so the result is the
    same, bit for bit, for any number of processes and interruptions.

    Args:
        sites: names of the sites to observe.
        folder: used only by this calibration; created if it does not exist.
        rows_kept: the greatest number of kept rows of each site, spread evenly over batches and timesteps.

    Raises:
        CalibrationError: an input has NaN or Inf or is always zero, or another process has ended.
    """
    import torch

    sampling, group, denoiser = calls.sampling, calls.group, calls.denoiser
    rows_of_call, stride = max(1, rows_kept // sampling.calls), -(-sampling.calls // rows_kept)
    widths = {site.name: denoiser.weight(site.linears[0]).shape[1] for site in denoiser.sites if site.name in sites}
    journal = Journal(folder, group.rank, {"sites": widths, "sampling": asdict(sampling), "rows": rows_kept, "size": group.size})
    # (-low, high), so that both merge by the maximum. A record of `rows` holds the rows of one call.
    ranges = RecordFile(folder / f"ranges.{group.rank}", {name: 2 * width for name, width in widths.items()}, np.float32)
    rows = RecordFile(folder / f"rows.{group.rank}", {name: rows_of_call * width for name, width in widths.items()}, np.float32)
    random = torch.Generator()

    def collect(call: Call, name: str, value: torch.Tensor | Patches) -> None:
        if name not in widths:
            return
        low, high = value.extremes() if isinstance(value, Patches) else torch.aminmax(value, dim=0)
        extremes = np.nan_to_num(torch.cat([-low, high]).cpu().numpy(), nan=np.inf, posinf=np.inf, neginf=-np.inf)
        ranges.write(call.record, name, np.maximum(extremes, ranges.read(call.record, name)) if call.seen else extremes)
        if call.keeps(stride):
            random.manual_seed((sampling.seed * 1_000_003 + call.number) % 2**64)
            chosen = torch.randint(len(value), (rows_of_call,), generator=random)
            rows.write(call.number // stride, name, value[chosen.to(value.device)].cpu().numpy())

    timesteps = calls.watch(collect, journal)
    order = list(dict.fromkeys(timesteps))
    indices = [call for call in range(0, sampling.calls, stride) if call % sampling.steps < len(timesteps)]
    if group.size > 1:
        local = [call // sampling.steps % group.size == group.rank for call in indices]
        merge(ranges, [journal.done > 0] * len(order), group.largest, -np.inf)
        merge(rows, local, group.total, 0.0)
    row_step = np.repeat([order.index(timesteps[call % sampling.steps]) for call in indices], rows_of_call)
    result = Statistics(timesteps=np.asarray(order), row_step=row_step, records=len(indices), ranges=ranges, rows=rows)
    _check(result)
    return result


def _check(statistics: Statistics) -> None:
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
