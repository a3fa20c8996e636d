"""Continuous batching: requests share the calls of the network, whatever step each of them is at."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import accumulate

import numpy as np

from .conditions import Feed
from .job import DenoiserError, Job
from .schedules import Float32, Float64

Denoise = Callable[[Float32, Float64, Feed], Float32]
"""Takes latents float32[rows, ...], timesteps float64[rows] and conditions by name; returns float32[rows, ...]."""
CLOSING = "the server is shutting down"
WATCH = 0.2
"""Seconds between two checks whether a client still waits. Each check costs a message to the server."""


class BusyError(Exception):
    """The greatest number of requests is reached."""


class AbandonedError(Exception):
    """The client no longer waits."""


class Sampler:
    """Takes jobs from any thread, and samples them in threads of its own.

    A lane is a thread that calls the network, round after round, with the rows of its jobs. Latents of different sizes do not
    fit into one tensor, so a round calls the network with the jobs of one size, and the sizes of a lane take turns. Jobs of one
    size wait in order until their rows fit. A job joins the first lane whose calls of its size have room, at that lane's next
    round. While one lane's call is computed, another lane prepares its next. A call that fails is repeated once without rows
    of other callers of the network, which the server may have added. If it fails again each job is called alone, so only the
    jobs at fault end with an error.

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
            self.changed.wait_for(lambda: self.closed or lane or self._next(lane))
            while job := self._next(lane):
                self.waiting.remove(job)
                lane.append(job)
                self.changed.notify_all()  # the next one may be another lane's
            return not self.closed

    def _next(self, lane: list[Job]) -> Job | None:
        """Return a job that belongs to this lane, the first that waits of its size. Earlier lanes fill up first, which makes
        calls large."""
        for job in {job.size: job for job in reversed(self.waiting)}.values():
            rows = (sum(other.rows for other in jobs if other.size == job.size) for jobs in self.lanes)
            room = [count + job.rows <= self.max_rows for count in rows]
            if True in room and self.lanes[room.index(True)] is lane:
                return job
        return None

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
        """Compute the conditions of the jobs whose turn it is, and return the jobs. A job whose conditions fail ends."""
        jobs = self._turn(lane)
        for job in list(jobs):
            try:
                job.prepared()
            except DenoiserError as error:
                jobs.remove(job)
                self._end(lane, job, error)
        return jobs

    def _turn(self, lane: list[Job]) -> list[Job]:
        """Return the jobs of one size, and move them behind those of other sizes, whose turn comes next."""
        with self.changed:
            jobs = [job for job in lane if job.size == lane[0].size]
            lane[:] = [*(job for job in lane if job not in jobs), *jobs]
        return jobs

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
        """Concatenate the conditions of jobs. Embeddings of texts are large, so the result is kept while the same jobs share
        calls."""
        with self.changed:
            for earlier, feed in self.joined:
                if earlier == jobs:
                    return feed
            others = {job for lane in self.lanes for job in lane} - set(jobs)
            self.joined = [entry for entry in self.joined if others.issuperset(entry[0])]
        feed = {name: np.concatenate([rows[name] for rows in feeds]) for name in feeds[0]}
        self.joined = [(jobs, feed), *self.joined]
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
