"""Network calls of calibration's pictures on disk, sample by sample, so that a batch can mix timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dq_export.core.network import Feed, Input

from ..collect.records import RecordFile
from ..collect.sampling import Sampling

Int64 = npt.NDArray[np.int64]
HELD_BACK = 8
"""One of this many pictures is not trained on; its samples judge the training."""


class FeedFiles:
    """Files of a network's inputs. The state is stored for each call, all other inputs once for each picture.

    Args:
        folder: folder for these files alone. Files of an earlier run are kept.
        inputs: the network's inputs.
    """

    def __init__(self, folder: Path, inputs: Sequence[Input], sampling: Sampling) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.inputs, self.sampling = tuple(inputs), sampling
        self.shapes = {item.name: item.zeros(1).shape for item in inputs if item.role != "timestep"}
        self.files = {
            item.name: RecordFile(folder / f"feed.{item.name}", {item.name: item.zeros(1).size}, item.dtype)
            for item in inputs
            if item.role != "timestep"
        }
        self.counts = RecordFile(folder / "feed.counts", {"copies": 1, "calls": 1}, np.int64)
        self.times = RecordFile(folder / "feed.timestep", {"timestep": 1}, np.float64)

    def record(self, batch: int, place: int, feed: Feed) -> None:
        """Store a call. Calls after the sampler's last step are ignored.

        Raises:
            OSError: no space is left.
        """
        sampling = self.sampling
        if place >= sampling.steps:
            return
        pictures, start, rows = len(sampling.pictures(batch)[0]), batch * sampling.batch, len(feed[self.inputs[0].name])
        copies = rows // pictures
        self.counts.write_record(0, np.asarray([copies, place + 1]))
        self.times.write(place, "timestep", np.asarray(feed["timestep"][:1]))
        for item in self.inputs:
            if item.role == "state":
                self.files[item.name].write(copies * (start * sampling.steps + place * pictures), item.name, feed[item.name])
            elif item.role != "timestep" and place == 0:
                self.files[item.name].write(copies * start if item.batched else 0, item.name, feed[item.name])

    def samples(self, limit: int, seed: int) -> Samples:
        """Return the samples of all calls, or a random choice of `limit` samples. Every batch must be recorded.

        Raises:
            CalibrationError: a file was cut short.
        """
        sampling = self.sampling
        copies, calls = map(int, self.counts.read_record(0))
        parts = []
        for batch in range(sampling.batches):
            pictures, start = len(sampling.pictures(batch)[0]), batch * sampling.batch
            place, row = np.divmod(np.arange(calls * copies * pictures), copies * pictures)
            state = copies * (start * sampling.steps + place * pictures) + row
            parts.append(np.stack([state, copies * start + row, place, start + row % pictures]))
        state, condition, place, picture = np.concatenate(parts, axis=1)
        choice = np.sort(np.random.default_rng(seed).permutation(len(state))[:limit])
        times = np.asarray([float(self.times.read(place, "timestep")[0]) for place in range(calls)])
        return Samples(self, state[choice], condition[choice], times[place[choice]], picture[choice])


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of network calls, each with its own timestep.

    Args:
        state, condition: int64[N], each sample's record in the files of those inputs.
        timestep: float64[N], each sample's timestep.
        picture: int64[N], index of each sample's picture in calibration.
    """

    files: FeedFiles
    state: Int64
    condition: Int64
    timestep: npt.NDArray[np.float64]
    picture: Int64

    def __len__(self) -> int:
        return len(self.state)

    @property
    def held_back(self) -> npt.NDArray[np.bool_]:
        """bool[N]: the samples that judge a training. They are those of each HELD_BACK-th picture, or of the last one."""
        pictures = np.unique(self.picture)
        if len(pictures) == 1:  # without another picture, every HELD_BACK-th call judges
            return np.asarray(np.arange(len(self)) % HELD_BACK == HELD_BACK - 1)
        judges = pictures[HELD_BACK - 1 :: HELD_BACK] if len(pictures) >= HELD_BACK else pictures[-1:]
        return np.isin(self.picture, judges)

    def feed(self, rows: Int64) -> Feed:
        """Return the network's inputs for some samples."""
        feed = {}
        for item in self.files.inputs:
            if item.role == "timestep":
                feed[item.name] = self.timestep[rows].astype(item.dtype)
                continue
            file, shape = self.files.files[item.name], self.files.shapes[item.name]
            records = (self.state if item.role == "state" else self.condition)[rows] if item.batched else [0]
            values = np.stack([file.read(int(record), item.name) for record in records])
            feed[item.name] = values.reshape(len(records) * shape[0] if item.batched else shape[0], *shape[1:])
        return feed
