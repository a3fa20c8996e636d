"""What a client may ask for, checked before anything is computed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .conditions import BadRequestError, Feed, Wanted
from .sampler import Client, Job
from .schedules import Float32, ScheduleError, Schedules

UInt64 = npt.NDArray[np.uint64]
SAFE_SEED = 2**53
"""Seeds that are chosen here stay below it: JSON readers hold numbers as float64."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model takes, and the defaults of what a request leaves out.

    A request is a batch of n pictures: every input has n rows.

    Args:
        shape: (C, H, W) of one picture's latents.
        max_rows: rows of one network call.
    """

    shape: tuple[int, int, int]
    max_rows: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str

    def job(self, inputs: Feed, wanted: Wanted, schedules: Schedules, seeds: UInt64, client: Client) -> Job:
        """The work that a request asks for.

        Args:
            inputs: all but the conditions; each may be absent.
            wanted: the conditions.
            seeds: uint64[n, 1], of the noise where there are no `latents`.

        Raises:
            BadRequestError: with the input, what is expected and what was found.
        """
        count = int(_shared(inputs, "num_inference_steps", self.num_inference_steps))
        guidance = float(_shared(inputs, "guidance_scale", self.guidance_scale))
        if not (np.isfinite(guidance) and guidance >= 0):
            raise BadRequestError(f"guidance_scale: expected a finite number, 0 or more (1 and less: off), found {guidance}")
        every = int(_shared(inputs, "preview_every", 0))
        if every < 0:
            raise BadRequestError(f"preview_every: expected 0 (no previews) or more steps, found {every}")
        name = _shared(inputs, "scheduler", self.scheduler)
        try:
            text = name.decode() if isinstance(name, bytes) else str(name)
            steps = schedules.steps(text, count)
        except UnicodeDecodeError as error:
            raise BadRequestError(f"scheduler: expected one of {', '.join(schedules.tables)}, found no UTF-8 text") from error
        except ScheduleError as error:
            raise BadRequestError(str(error)) from error
        if seeds.shape != (wanted.count, 1):
            raise BadRequestError(f"seed: expected shape {[wanted.count, 1]}, found {list(seeds.shape)}")
        latents = self._latents(inputs["latents"], wanted.count) if "latents" in inputs else self.noise(seeds)
        guided = guidance > 1
        if wanted.count * (1 + guided) > self.max_rows:  # it would wait for ever
            raise BadRequestError(
                f"{wanted.count} pictures: a guided picture is two rows of a call; expected {self.max_rows} rows at the most"
            )
        conditions = partial(wanted.rows, guided)
        return Job(client=client, steps=steps, latents=latents, conditions=conditions, guidance=guidance, every=every)

    def noise(self, seeds: UInt64) -> Float32:
        """float32[n, C, H, W], each picture of its own seed alone; `seeds` is uint64[n, 1]."""
        each = (np.random.default_rng(int(seed)) for seed in seeds.ravel())
        return np.stack([generator.standard_normal(self.shape, dtype=np.float32) for generator in each])

    def _latents(self, given: npt.NDArray[Any], pictures: int) -> Float32:
        latents: Float32 = np.array(given, dtype=np.float32)
        if latents.shape != (pictures, *self.shape):
            raise BadRequestError(f"latents: expected shape {[pictures, *self.shape]}, found {list(latents.shape)}")
        if not np.isfinite(latents).all():
            raise BadRequestError("latents: NaN or Inf; expected finite unit noise")
        return latents


def seeds_of(inputs: Feed, count: int) -> UInt64:
    """uint64[n, 1]: the request's seeds, or others of our own choice, for each of its pictures."""
    if "seed" in inputs:
        return np.array(inputs["seed"], dtype=np.uint64)
    return np.array([[secrets.randbelow(SAFE_SEED)] for _ in range(count)], dtype=np.uint64)


def _shared(inputs: Feed, name: str, default: Any) -> Any:
    """The one value that all pictures of a request have."""
    values = list(inputs[name].ravel()) if name in inputs else [default]
    if len(values) == 0 or any(value != values[0] for value in values[1:]):
        raise BadRequestError(f"{name}: expected the same value for every picture of a request; send others in another request")
    return values[0]
