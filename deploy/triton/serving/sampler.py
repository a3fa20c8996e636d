"""Continuous batching: requests share the calls of the network, whatever step each of them is at."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np

from .conditions import Feed
from .schedules import Float32, Float64, Step

Denoise = Callable[[Float32, Float64, Feed], Float32]
"""Takes latents float32[rows, ...], timesteps float64[rows] and conditions by name; returns float32[rows, ...]."""
CLOSING = "the server is shutting down"
WATCH = 0.2
"""Seconds between two checks whether a client still waits. Each check costs a message to the server."""


class DenoiserError(Exception):
    """A call of the network failed; the message is the server's."""


class BusyError(Exception):
    """The greatest number of requests is reached."""


class AbandonedError(Exception):
    """The client no longer waits."""


class Client(Protocol):
    """Receives the results of one job."""

    def preview(self, step: int, latents: Float32) -> None:
        """Receive the picture that the network predicts after `step` steps."""

    def done(self, latents: Float32) -> None:
        """Receive the sampled latents."""

    def failed(self, error: Exception) -> None:
        """Receive an error; no result follows."""

    def disconnected(self) -> bool:
        """Whether the client no longer waits."""


@dataclass(eq=False)
class Job:
    """The pictures of one request, and the state of their sampling.

    Args:
        steps: the steps of the sampler, at least one.
        latents: float32[n, C, H, W], unit noise.
        conditions: returns the network's conditions with `rows` rows each. It may take long, and raise DenoiserError.
        guidance: above 1 each picture takes two rows of a network call, one with its condition and one without.
        preview_interval: number of steps between two previews; 0: no previews.
    """

    client: Client
    steps: tuple[Step, ...]
    latents: Float32
    conditions: Callable[[], Feed]
    guidance: float
    preview_interval: int = 0
    at: int = 0
    checked: float = 0.0
    computed: Feed | None = None
    x_before: Float32 = field(init=False)
    e_before: Float32 = field(init=False)

    def __post_init__(self) -> None:
        self.latents = np.float32(self.steps[0].noise) * self.latents
        self.x_before = self.e_before = np.zeros_like(self.latents)

    @property
    def guided(self) -> bool:
        """Whether the network is called with and without each picture's condition."""
        return self.guidance > 1

    @property
    def rows(self) -> int:
        """The number of rows of a network call."""
        return len(self.latents) * (2 if self.guided else 1)

    def feed(self) -> tuple[Float32, Float64, Feed]:
        """Return the job's rows of the next network call: latents, timesteps and conditions."""
        step = self.steps[self.at]
        states = self.latents if step.input == 1 else step.input * self.latents
        states = np.concatenate([states, states]) if self.guided else states
        return states, np.full(self.rows, step.timestep), self.prepared()

    def prepared(self) -> Feed:
        """Return the conditions. The first call computes them."""
        if self.computed is None:
            self.computed = self.conditions()
        return self.computed

    def advance(self, output: Float32) -> None:
        """Take one step.

        Args:
            output: the network's output for the job's rows. Channels beyond the first C hold a learned sigma and are not used.

        Raises:
            DenoiserError: the output is not finite.
        """
        if not np.isfinite(output).all():
            raise DenoiserError(f"the denoiser's output is not finite at step {self.at + 1}")
        predicted = output[:, : self.latents.shape[1]]
        if self.guided:
            conditional, unconditional = predicted[: len(self.latents)], predicted[len(self.latents) :]
            predicted = unconditional + self.guidance * (conditional - unconditional)
        step, x = self.steps[self.at], self.latents
        self.latents = step.advance(x, predicted, self.x_before, self.e_before)
        self.x_before, self.e_before = x, predicted
        self.at += 1
        if self.preview_interval and self.at % self.preview_interval == 0 and self.at < len(self.steps):
            self.client.preview(self.at, step.clean(x, predicted))


class Sampler:
    """Takes jobs from any thread, and samples them in threads of its own.

    A lane is a thread that calls the network, round after round, with the rows of all its jobs. Jobs wait in order until
    their rows fit. A job joins the first lane that has room, at that lane's next round. While one lane's call is computed,
    another lane prepares its next. A call that fails is repeated once without rows of other callers of the network, which the
    server may have added. If it fails again each job is called alone, so only the jobs at fault end with an error.

    Args:
        denoise: calls the network; raises DenoiserError.
        max_rows: the most rows of a call, the network's greatest batch.
        max_jobs: the most jobs, waiting ones included.
        lanes: number of simultaneous calls.
    """

    def __init__(self, denoise: Denoise, *, max_rows: int, max_jobs: int, lanes: int) -> None:
        self.denoise = denoise
        self.max_rows, self.max_jobs = max_rows, max_jobs
        self.waiting: deque[Job] = deque()
        self.lanes: list[list[Job]] = [[] for _ in range(lanes)]
        self.joined: list[tuple[tuple[Job, ...], Feed]] = []
        self.changed = threading.Condition()
        self.closed = False
        self.threads = [threading.Thread(target=self._run, args=(lane,), daemon=True) for lane in self.lanes]
        for thread in self.threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Add a job. Its client receives the results.

        Raises:
            BusyError: there are too many jobs, or the server is shutting down.
        """
        with self.changed:
            if self.closed:
                raise BusyError(CLOSING)
            if len(self.waiting) + sum(map(len, self.lanes)) >= self.max_jobs:
                raise BusyError(f"{self.max_jobs} requests are being sampled or wait; try again later")
            self.waiting.append(job)
            self.changed.notify_all()

    def close(self) -> None:
        """End after the current rounds. Clients that still wait receive an error."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        for job in (*self.waiting, *(job for lane in self.lanes for job in lane)):
            job.client.failed(BusyError(CLOSING))

    def _run(self, lane: list[Job]) -> None:
        while self._admit(lane):
            try:
                self._round(lane)
            except Exception as error:  # noqa: BLE001 - any error ends the lane's jobs, not the server
                for job in list(lane):
                    self._end(lane, job, error)

    def _admit(self, lane: list[Job]) -> bool:
        """Move waiting jobs into a lane; wait for one if the lane is empty. Return False when the sampler is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or lane or self._next_fits(lane))
            while self._next_fits(lane):
                lane.append(self.waiting.popleft())
                self.changed.notify_all()  # the next one may be another lane's
            return not self.closed

    def _next_fits(self, lane: list[Job]) -> bool:
        """Whether the first waiting job belongs to this lane. Earlier lanes fill up first, which makes calls large."""
        if not self.waiting:
            return False
        room = [sum(job.rows for job in jobs) + self.waiting[0].rows <= self.max_rows for jobs in self.lanes]
        return True in room and self.lanes[room.index(True)] is lane

    def _round(self, lane: list[Job]) -> None:
        self._drop_abandoned(lane)
        jobs = self._ready(lane)
        if not jobs:
            return
        outputs: list[Float32 | DenoiserError]
        try:
            outputs = [*self._call(jobs)]
        except DenoiserError:
            try:
                outputs = [*self._call(jobs, filled=True)]
            except DenoiserError as error:
                outputs = [error] if len(jobs) == 1 else [self._alone(job) for job in jobs]
        for job, output in zip(jobs, outputs, strict=True):
            self._advance(lane, job, output)

    def _ready(self, lane: list[Job]) -> list[Job]:
        """Compute the conditions of a lane's jobs, and return the jobs. A job whose conditions fail ends."""
        for job in list(lane):
            try:
                job.prepared()
            except DenoiserError as error:
                self._end(lane, job, error)
        return list(lane)

    def _call(self, jobs: list[Job], *, filled: bool = False) -> list[Float32]:
        """Call the network once, and return one output per job.

        Args:
            filled: whether rows are repeated up to the greatest batch, so that the server cannot add rows of other callers.
        """
        states, timesteps, feeds = (list(parts) for parts in zip(*(job.feed() for job in jobs), strict=True))
        rows = sum(job.rows for job in jobs)
        index = np.arange(self.max_rows) % rows if filled else slice(None)
        conditions = {name: values[index] for name, values in self._joined(tuple(jobs), feeds).items()}
        output = self.denoise(np.concatenate(states)[index], np.concatenate(timesteps)[index], conditions)[:rows]
        ends = list(accumulate(job.rows for job in jobs))
        return [output[end - job.rows : end] for job, end in zip(jobs, ends, strict=True)]

    def _joined(self, jobs: tuple[Job, ...], feeds: list[Feed]) -> Feed:
        """Concatenate the conditions of jobs. Embeddings of texts are large, so the result is kept while a lane's jobs stay."""
        for earlier, feed in self.joined:
            if earlier == jobs:
                return feed
        feed = {name: np.concatenate([rows[name] for rows in feeds]) for name in feeds[0]}
        self.joined = [(jobs, feed), *self.joined[: len(self.lanes) - 1]]
        return feed

    def _alone(self, job: Job) -> Float32 | DenoiserError:
        try:
            return self._call([job], filled=True)[0]
        except DenoiserError as error:
            return error

    def _advance(self, lane: list[Job], job: Job, output: Float32 | DenoiserError) -> None:
        try:
            if isinstance(output, DenoiserError):
                raise output
            job.advance(output)
        except DenoiserError as error:
            self._end(lane, job, error)
        else:
            if job.at == len(job.steps):
                self._end(lane, job, None)

    def _end(self, lane: list[Job], job: Job, error: Exception | None) -> None:
        with self.changed:
            lane.remove(job)
            self.changed.notify_all()
        if error:
            job.client.failed(error)
        else:
            job.client.done(job.latents)

    def _drop_abandoned(self, lane: list[Job]) -> None:
        """Remove the jobs whose clients are gone, so that other jobs get their rows."""
        now = time.monotonic()
        with self.changed:
            jobs = [job for job in (*lane, *self.waiting) if now - job.checked >= WATCH]
            for job in jobs:
                job.checked = now
        for job in jobs:
            if job.client.disconnected():
                with self.changed:
                    if job not in lane and job not in self.waiting:
                        continue  # another lane took it meanwhile, and will check it
                    (lane if job in lane else self.waiting).remove(job)
                job.client.failed(AbandonedError("cancelled by the client"))
