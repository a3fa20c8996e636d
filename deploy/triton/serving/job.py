"""The pictures of one request, and the state of their sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .conditions import Feed
from .schedules import Float32, Float64, Step


class DenoiserError(Exception):
    """A call of the network failed; the message is the server's."""


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

    @property
    def size(self) -> tuple[int, ...]:
        """(C, H, W) of one picture's latents. Jobs of one size share calls."""
        return self.latents.shape[1:]

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
