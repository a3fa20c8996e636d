"""Continuous batching: every request that is being sampled shares each call of the network, whatever its step."""

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
"""Latents float32[rows, ...], timesteps float64[rows], conditions with a row each by name -> float32[rows, ...]."""
CLOSING = "the server is shutting down"
WATCH = 0.2
"""Seconds between two questions whether a client still waits; each costs a message to the server."""


class DenoiserError(Exception):
    """The network could not be called; the message is the server's."""


class BusyError(Exception):
    """As many requests as are allowed wait already."""


class AbandonedError(Exception):
    """The client waits no more."""


class Client(Protocol):
    """Who asked, and is told."""

    def preview(self, step: int, latents: Float32) -> None:
        """The picture as predicted after `step` steps."""

    def done(self, latents: Float32) -> None:
        """The sampled latents."""

    def failed(self, error: Exception) -> None:
        """Nothing will come."""

    def gone(self) -> bool:
        """Whether nobody waits any more."""


@dataclass(eq=False)
class Job:
    """Pictures that one client asked for, on their way.

    Args:
        steps: of its sampler, at least one.
        latents: float32[n, C, H, W], unit noise.
        conditions: gives the network's conditions, `rows` of each; may take long, and raise DenoiserError.
        guidance: above 1 each picture is two rows of a network call, with its condition and without.
        every: a preview each so many steps; 0: none.
    """

    client: Client
    steps: tuple[Step, ...]
    latents: Float32
    conditions: Callable[[], Feed]
    guidance: float
    every: int = 0
    at: int = 0
    asked: float = 0.0
    drawn: Feed | None = None
    x_before: Float32 = field(init=False)
    e_before: Float32 = field(init=False)

    def __post_init__(self) -> None:
        self.latents = np.float32(self.steps[0].noise) * self.latents
        self.x_before = self.e_before = np.zeros_like(self.latents)

    @property
    def guided(self) -> bool:
        """Whether each picture is asked for with its condition and without."""
        return self.guidance > 1

    @property
    def rows(self) -> int:
        """Rows of a network call."""
        return len(self.latents) * (2 if self.guided else 1)

    def feed(self) -> tuple[Float32, Float64, Feed]:
        """Its rows of the next network call."""
        step = self.steps[self.at]
        states = self.latents if step.input == 1 else step.input * self.latents
        states = np.concatenate([states, states]) if self.guided else states
        return states, np.full(self.rows, step.timestep), self.prepared()

    def prepared(self) -> Feed:
        """Its conditions, computed at the first question for them."""
        if self.drawn is None:
            self.drawn = self.conditions()
        return self.drawn

    def advance(self, output: Float32) -> None:
        """Take one step.

        Args:
            output: the network's for this job's rows; a learned sigma behind the first C channels is not used.

        Raises:
            DenoiserError: it is not finite.
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
        if self.every and self.at % self.every == 0 and self.at < len(self.steps):
            self.client.preview(self.at, step.clean(x, predicted))


class Sampler:
    """Takes jobs from any thread and samples them all in its own.

    A lane is a thread that calls the network, round after round, with the rows of all its jobs. Jobs wait, in order, until
    their rows fit; one joins a lane at the round after it came, the first lane that has room. While one lane's call is
    computed another prepares its next. When a call fails it is tried once more without rows of other callers of the network,
    which the server may have added; and then each job alone, so that only the guilty fail.

    Args:
        denoise: one network call; raises DenoiserError.
        most_rows: of a call: the network's greatest batch.
        most_jobs: being sampled and waiting together.
        lanes: calls at the same time.
    """

    def __init__(self, denoise: Denoise, *, most_rows: int, most_jobs: int, lanes: int) -> None:
        self.denoise = denoise
        self.most_rows, self.most_jobs = most_rows, most_jobs
        self.waiting: deque[Job] = deque()
        self.lanes: list[list[Job]] = [[] for _ in range(lanes)]
        self.joined: list[tuple[tuple[Job, ...], Feed]] = []
        self.changed = threading.Condition()
        self.closed = False
        self.threads = [threading.Thread(target=self._run, args=(lane,), daemon=True) for lane in self.lanes]
        for thread in self.threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Have a job sampled; its client hears of it.

        Raises:
            BusyError: too many are there, or the server is shutting down.
        """
        with self.changed:
            if self.closed:
                raise BusyError(CLOSING)
            if len(self.waiting) + sum(map(len, self.lanes)) >= self.most_jobs:
                raise BusyError(f"{self.most_jobs} requests are being sampled or wait; try again later")
            self.waiting.append(job)
            self.changed.notify_all()

    def close(self) -> None:
        """End after the present rounds; whoever waits is told."""
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
            except Exception as error:  # noqa: BLE001 - whatever it was: those it struck are told, and the server goes on
                for job in list(lane):
                    self._end(lane, job, error)

    def _admit(self, lane: list[Job]) -> bool:
        """Let waiting jobs in, and wait for one where there is none. False: closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or lane or self._next_fits(lane))
            while self._next_fits(lane):
                lane.append(self.waiting.popleft())
                self.changed.notify_all()  # the next one may be another lane's
            return not self.closed

    def _next_fits(self, lane: list[Job]) -> bool:
        """Whether the first that waits is this lane's to take: lanes before it fill up first, which makes calls large."""
        if not self.waiting:
            return False
        room = [sum(job.rows for job in jobs) + self.waiting[0].rows <= self.most_rows for jobs in self.lanes]
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
        """The lane's jobs, their conditions computed; those of which that fails end."""
        for job in list(lane):
            try:
                job.prepared()
            except DenoiserError as error:
                self._end(lane, job, error)
        return list(lane)

    def _call(self, jobs: list[Job], *, filled: bool = False) -> list[Float32]:
        """One output a job.

        Args:
            filled: up to the greatest batch, so that the server can put no one else's rows into it.
        """
        states, timesteps, drawn = (list(parts) for parts in zip(*(job.feed() for job in jobs), strict=True))
        rows = sum(job.rows for job in jobs)
        index = np.arange(self.most_rows) % rows if filled else slice(None)
        conditions = {name: values[index] for name, values in self._joined(tuple(jobs), drawn).items()}
        output = self.denoise(np.concatenate(states)[index], np.concatenate(timesteps)[index], conditions)[:rows]
        ends = list(accumulate(job.rows for job in jobs))
        return [output[end - job.rows : end] for job, end in zip(jobs, ends, strict=True)]

    def _joined(self, jobs: tuple[Job, ...], drawn: list[Feed]) -> Feed:
        """The conditions of jobs one below the other, made once for as long as a lane's jobs are the same: texts are large."""
        for known, feed in self.joined:
            if known == jobs:
                return feed
        feed = {name: np.concatenate([each[name] for each in drawn]) for name in drawn[0]}
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
        """Forget the jobs that nobody waits for, so that their rows go to others."""
        now = time.monotonic()
        with self.changed:
            watched = [job for job in (*lane, *self.waiting) if now - job.asked >= WATCH]
            for job in watched:
                job.asked = now
        for job in watched:
            if job.client.gone():
                with self.changed:
                    if job not in lane and job not in self.waiting:
                        continue  # another lane took it meanwhile, and will ask
                    (lane if job in lane else self.waiting).remove(job)
                job.client.failed(AbandonedError("cancelled by the client"))
