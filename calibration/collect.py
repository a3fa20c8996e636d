"""Statistics of every site's input, gathered on disk while the float reference samples pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationError
from dq_export.core.documents import DocumentError, read_json
from dq_export.core.network import Denoiser
from dq_export.core.progress import Advance

from .group import ALONE, ProcessGroup
from .records import RecordFile

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
HISTOGRAM_BINS = 2048
HISTOGRAM_ROWS = 128
"""About how many rows of a site each network call adds to the histogram, evenly spaced; the range is from all rows."""
ROWS_KEPT = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteStatistics:
    """What one site's input looked like.

    Args:
        timesteps: float64[T], in the order in which they were sampled.
        low, high: float32[T, K], the least and greatest value of each channel at each timestep.
        rows: float32[R, K], rows kept to measure the output error of a choice, and row_step: int64[R], each row's index
            into `timesteps`.
    """

    timesteps: npt.NDArray[np.float64]
    low: Float32
    high: Float32
    rows: Float32
    row_step: npt.NDArray[np.int64]

    def amax(self, in_scale: Float32, in_shift: Float32) -> Float32:
        """float32[T]: max |(x - in_shift) / in_scale| at each timestep. Exactness: exact, from the channels' extremes."""
        extreme = np.maximum(np.abs(self.high - in_shift), np.abs(self.low - in_shift))
        return np.asarray((extreme / in_scale).max(axis=1), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which pictures calibration samples: `calib_size` of them, of each condition in turn, from one seed, `batch` to a call."""

    calib_size: int
    steps: int
    seed: int
    guidance: float
    conditions: int
    batch: int = 8

    @property
    def batches(self) -> int:
        """Runs of the sampler."""
        return -(-self.calib_size // self.batch)

    @property
    def calls(self) -> int:
        """Network calls in all."""
        return self.steps * self.batches

    def pictures(self, batch: int) -> tuple[npt.NDArray[np.int64], int]:
        """(index of each picture's condition, seed) of a batch. They do not depend on how many batches follow it."""
        start = batch * self.batch
        conditions = np.arange(start, min(start + self.batch, self.calib_size), dtype=np.int64) % self.conditions
        return conditions, self.seed + start


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics(Mapping[str, SiteStatistics]):
    """What was gathered, by site; read from disk each time it is asked for."""

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
        kept = np.concatenate(rows).reshape(-1, both.shape[2])
        return SiteStatistics(timesteps=self.timesteps, low=-both[:, 0], high=both[:, 1], rows=kept, row_step=self.row_step)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranges.sizes)

    def __len__(self) -> int:
        return len(self.ranges.sizes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Histograms(Mapping[str, npt.NDArray[np.int64]]):
    """int64[T, 2048] by site; read from disk each time it is asked for."""

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


def collect_ranges(
    denoiser: Denoiser,
    sites: tuple[str, ...],
    sampling: Sampling,
    progress: Advance,
    folder: Path,
    group: ProcessGroup = ALONE,
    rows_kept: int = ROWS_KEPT,
) -> Statistics:
    """Statistics by site. They lie in `folder`: memory grows neither with the pictures nor with the timesteps.

    A run that ends early leaves its finished batches there, and a later call with the same arguments goes on behind
    them. Each batch is sampled by one process; extremes and kept rows do not depend on the order, so the result is the
    same, bit for bit, for any number of processes and interruptions.

    Args:
        sites: names of the sites to watch.
        progress: called with (network calls done, network calls in all).
        folder: of this calibration only, made if it is not there.
        rows_kept: how many rows of each site are kept at most, spread evenly over batches and timesteps.

    Raises:
        CalibrationError: an input with NaN or Inf, one that is zero throughout, or another process has ended.
    """
    import torch

    each, stride = max(1, rows_kept // sampling.calls), -(-sampling.calls // rows_kept)
    widths = {site.name: denoiser.weight(site.linears[0]).shape[1] for site in denoiser.sites if site.name in sites}
    journal = _Journal(folder, group.rank, {"sites": widths, "sampling": asdict(sampling), "rows": rows_kept, "size": group.size})
    # (-low, high), so that both merge by the maximum. A record of `rows` holds the rows of one call.
    ranges = RecordFile(folder / f"ranges.{group.rank}", {name: 2 * width for name, width in widths.items()}, np.float32)
    rows = RecordFile(folder / f"rows.{group.rank}", {name: each * width for name, width in widths.items()}, np.float32)
    random = torch.Generator()

    def collect(call: _Call, name: str, value: torch.Tensor) -> None:
        if name not in widths:
            return
        low, high = torch.aminmax(value, dim=0)
        found = np.nan_to_num(torch.cat([-low, high]).cpu().numpy(), nan=np.inf, posinf=np.inf, neginf=-np.inf)
        ranges.write(call.record, name, np.maximum(found, ranges.read(call.record, name)) if call.seen else found)
        if call.kept(stride):
            random.manual_seed((sampling.seed * 1_000_003 + call.number) % 2**64)
            chosen = torch.randint(len(value), (each,), generator=random)
            rows.write(call.number // stride, name, value[chosen.to(value.device)].cpu().numpy())

    timesteps = _run(denoiser, sampling, collect, progress, journal, group)
    order = list(dict.fromkeys(timesteps))
    calls = [call for call in range(0, sampling.calls, stride) if call % sampling.steps < len(timesteps)]
    if group.size > 1:
        mine = [call // sampling.steps % group.size == group.rank for call in calls]
        _merge(ranges, [journal.done > 0] * len(order), group.largest, -np.inf)
        _merge(rows, mine, group.total, 0.0)
    row_step = np.repeat([order.index(timesteps[call % sampling.steps]) for call in calls], each)
    result = Statistics(timesteps=np.asarray(order), row_step=row_step, records=len(calls), ranges=ranges, rows=rows)
    _check(result)
    return result


def collect_histograms(
    denoiser: Denoiser,
    transforms: Mapping[str, tuple[Float32, Float32]],
    amax: Mapping[str, Float32],
    sampling: Sampling,
    progress: Advance,
    folder: Path,
    group: ProcessGroup = ALONE,
) -> Histograms:
    """int64[T, 2048] by site: counts of |(x - in_shift) / in_scale| in equal cells of [0, amax[t]], for each timestep.

    A second run over the same pictures: clipping acts on the scaled input, and the scaling was chosen from the first.
    The counts lie in `folder`; they are whole numbers, so their sum is the same for any number of processes.

    Args:
        transforms: (in_scale, in_shift) by site.
        amax: float32[T] by site, as `SiteStatistics.amax` of the same transform gives it.
    """
    import torch

    steps = len(next(iter(amax.values())))
    counts = RecordFile(folder / f"histograms.{group.rank}", dict.fromkeys(amax, HISTOGRAM_BINS), np.int64)
    for step in range(steps):
        counts.write_record(step, np.zeros(HISTOGRAM_BINS * len(amax), dtype=np.int64))
    tensors = {
        name: (torch.from_numpy(1.0 / in_scale), torch.from_numpy(in_shift.copy()))
        for name, (in_scale, in_shift) in transforms.items()
    }

    def collect(call: _Call, name: str, value: torch.Tensor) -> None:
        if name in tensors:
            inverse, in_shift = (tensor.to(value.device) for tensor in tensors[name])
            limit = float(amax[name][call.record])
            rows = value[:: max(1, len(value) // HISTOGRAM_ROWS)]
            scaled = ((rows - in_shift) * inverse).abs_().clamp_(max=limit)
            found = torch.histc(scaled, HISTOGRAM_BINS, 0.0, limit or 1.0).cpu().numpy().astype(np.int64)
            counts.write(call.record, name, counts.read(call.record, name) + found)

    _run(denoiser, sampling, collect, progress, _Journal(None, group.rank, {}), group)
    if group.size > 1:
        _merge(counts, [True] * steps, group.total, 0)
    return Histograms(steps=steps, counts=counts)


def watch_calls(
    denoiser: Denoiser,
    sampling: Sampling,
    collect: Callable[[int, str, Float32], None],
    progress: Advance,
    group: ProcessGroup = ALONE,
) -> None:
    """Sample this process's pictures once more; `collect` gets each input: (index of its timestep, site, float32[rows, K])."""

    def pass_on(call: _Call, name: str, value: torch.Tensor) -> None:
        collect(call.record, name, value.cpu().numpy())

    _run(denoiser, sampling, pass_on, progress, _Journal(None, group.rank, {}), group)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One network call.

    Args:
        number: over all batches, `steps` to a batch; `place` in its batch.
        record: index of its timestep among the distinct ones.
        seen: whether this process has finished a call at that timestep.
    """

    number: int
    place: int
    steps: int
    record: int
    seen: bool

    def kept(self, stride: int) -> bool:
        """Whether rows of it are kept. Samplers may call the network more often than they have steps."""
        return self.place < self.steps and self.number % stride == 0


class _Journal:
    """How many of its batches a process has finished, in a file; in memory only without a folder."""

    def __init__(self, folder: Path | None, rank: int, key: Mapping[str, object]) -> None:
        self._path = folder / f"journal.{rank}.json" if folder else None
        self._key = json.loads(json.dumps(key))
        self.done = 0
        self.timesteps: list[float] = []
        if folder and self._path:
            folder.mkdir(parents=True, exist_ok=True)
            self.done, self.timesteps = self._kept(self._path)

    def _kept(self, path: Path) -> tuple[int, list[float]]:
        """What the file says of the same key; nothing is finished where it is damaged."""
        try:
            kept = read_json(path, links=False)
        except DocumentError:
            return 0, []
        if not isinstance(kept, dict) or kept.get("key") != self._key:
            return 0, []
        done, timesteps = kept.get("done"), kept.get("timesteps")
        if not isinstance(done, int) or done < 0 or not isinstance(timesteps, list):
            return 0, []
        return (done, timesteps) if all(isinstance(item, int | float) for item in timesteps) else (0, [])

    def finish(self, timesteps: list[float]) -> None:
        """Another batch is finished; `timesteps` of its calls."""
        self.done, self.timesteps = self.done + 1, timesteps
        if self._path:
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({"key": self._key, "done": self.done, "timesteps": timesteps}))
            os.replace(new, self._path)


def _run(
    denoiser: Denoiser,
    sampling: Sampling,
    collect: Callable[[_Call, str, torch.Tensor], None],
    progress: Advance,
    journal: _Journal,
    group: ProcessGroup,
) -> list[float]:
    """Sample this process's unfinished batches; hand each site's input to `collect` as it passes. The calls' timesteps."""
    call = _Call(number=0, place=0, steps=sampling.steps, record=0, seen=False)
    batches = range(group.rank, sampling.batches, group.size)
    done, total = journal.done * sampling.steps, len(batches) * sampling.steps
    timesteps: list[float] = []

    def start_call(batch: int, timestep: float) -> None:
        nonlocal call
        if timesteps:
            progress(done + min(len(timesteps), sampling.steps), total)
        place, known = len(timesteps), list(dict.fromkeys([*timesteps, timestep]))
        call = _Call(
            number=batch * sampling.steps + place,
            place=place,
            steps=sampling.steps,
            record=known.index(timestep),
            seen=journal.done > 0 or timestep in timesteps,
        )
        timesteps.append(timestep)

    with denoiser.observe(lambda name, value: collect(call, name, value)):
        for batch in batches[journal.done :]:
            conditions, seed = sampling.pictures(batch)
            timesteps.clear()
            progress(done, total)
            before, guidance = partial(start_call, batch), sampling.guidance
            denoiser.trajectory(conditions, steps=sampling.steps, seed=seed, guidance=guidance, before=before)
            journal.finish([*timesteps])
            done += sampling.steps
    progress(total, total)
    # A process without a batch learns the timesteps from the others.
    length = int(group.largest(np.asarray([len(journal.timesteps)]))[0])
    told = np.full(length, -np.inf)
    told[: len(journal.timesteps)] = journal.timesteps
    shared: list[float] = group.largest(told).tolist()
    return shared


def _merge(
    file: RecordFile, written: list[bool], reduce: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]], absent: float
) -> None:
    """Reduce every record over the processes; `written` says which this process has, `absent` stands for the others."""
    for record, here in enumerate(written):
        values = file.read_record(record) if here else np.full(file.length, absent, dtype=file.dtype)
        file.write_record(record, reduce(values))


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
