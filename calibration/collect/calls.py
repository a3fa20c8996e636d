"""The network calls that draw a calibration's pictures, and the callbacks that observe them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dq_export.core.network import Denoiser, Feed
from dq_export.core.patches import Patches
from dq_export.core.progress import Advance, unwatched

from ..group import ALONE, ProcessGroup
from .journal import Journal
from .sampling import Sampling

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Call:
    """One network call.

    Args:
        number: counted over all batches, with `steps` calls per batch; `place` is its number in the batch.
        record: the index of its timestep among the distinct ones.
        seen: whether this process has already finished a call at that timestep.
    """

    number: int
    place: int
    steps: int
    record: int
    seen: bool

    def keeps(self, stride: int) -> bool:
        """Whether rows of this call are kept. Samplers may call the network more often than they have steps."""
        return self.place < self.steps and self.number % stride == 0

    def contributes(self, stride: int) -> bool:
        """Whether it is one of every `stride` calls of its batch. The first of them is another one in the next batch, so that
        `stride` batches have every timestep."""
        return (self.place + self.number // self.steps) % stride == 0


Collect = Callable[[Call, str, "torch.Tensor | Patches"], None]
"""Called with each site's input float32[rows, K] at each network call: (call, site, input)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calls:
    """The network calls that draw a calibration's pictures, on the float reference.

    Args:
        progress: called with (network calls done, all network calls) of each run over the pictures.
        group: the processes that share the pictures; each draws whole batches.
        record: called with each call's batch, its number in the batch, and its inputs.
    """

    denoiser: Denoiser
    sampling: Sampling
    progress: Advance = unwatched
    group: ProcessGroup = ALONE
    record: Callable[[int, int, Feed], None] | None = None

    def watch(self, collect: Collect, journal: Journal | None = None) -> list[float]:
        """Draw this process's batches, and pass each site's input to `collect`.

        Args:
            journal: the batches that an earlier run has finished, which are skipped; None: all are drawn.

        Returns:
            The timesteps of one batch's calls, in order, on every process.
        """
        sampling, group = self.sampling, self.group
        journal = journal or Journal(None, group.rank, {})
        call = Call(number=0, place=0, steps=sampling.steps, record=0, seen=False)
        batches = range(group.rank, sampling.batches, group.size)
        done, total = journal.done * sampling.steps, len(batches) * sampling.steps
        timesteps: list[float] = []

        def start_call(batch: int, feed: Feed) -> None:
            nonlocal call
            timestep = float(feed["timestep"][0])
            if timesteps:
                self.progress(done + min(len(timesteps), sampling.steps), total, "calls")
            place, all_timesteps = len(timesteps), list(dict.fromkeys([*timesteps, timestep]))
            call = Call(
                number=batch * sampling.steps + place,
                place=place,
                steps=sampling.steps,
                record=all_timesteps.index(timestep),
                seen=journal.done > 0 or timestep in timesteps,
            )
            timesteps.append(timestep)
            if self.record:
                self.record(batch, place, feed)

        with self.denoiser.observe(lambda name, value: collect(call, name, value)):
            for batch in batches[journal.done :]:
                conditions, seed = sampling.pictures(batch)
                timesteps.clear()
                self.progress(done, total, "calls")
                before, guidance = partial(start_call, batch), sampling.guidance
                with self.denoiser.drawing(sampling.size(batch)):
                    self.denoiser.trajectory(conditions, steps=sampling.steps, seed=seed, guidance=guidance, before=before)
                journal.finish([*timesteps])
                done += sampling.steps
        self.progress(total, total, "calls")
        return _shared(group, journal.timesteps)


def _shared(group: ProcessGroup, timesteps: list[float]) -> list[float]:
    """The timesteps on every process; a process without a batch gets them from the others."""
    length = int(group.largest(np.asarray([len(timesteps)]))[0])
    padded = np.full(length, -np.inf)
    padded[: len(timesteps)] = timesteps
    shared: list[float] = group.largest(padded).tolist()
    return shared
