"""Checks requests before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .call import GUIDANCE, Call
from .conditions import BadRequestError, Feed, RequestConditions
from .job import Client, Job
from .schedules import Float32, ScheduleError, Schedules
from .sizes import Sizes

UInt64 = npt.NDArray[np.uint64]
SAFE_SEED = 2**53
"""Seeds that the server chooses stay below this limit, because JSON readers hold numbers as float64."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of requests, and the defaults of their optional inputs.

    A request is a batch of n pictures: every input has n rows.

    Args:
        shape: (C, H, W) of the latents that a request may bring.
        sizes: the sizes of pictures that a request may ask for.
        call: the network's inputs and its guidance.
        max_rows: the most rows of one network call.
    """

    shape: tuple[int, int, int]
    sizes: Sizes
    max_rows: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    call: Call

    def job(self, inputs: Feed, conditions: RequestConditions, schedules: Schedules, seeds: UInt64, client: Client) -> Job:
        """Return the job of a request.

        Args:
            inputs: the request's inputs; those that are read here may be absent.
            conditions: the request's conditions.
            seeds: uint64[n, 1], seeds of the noise if the request has no `latents`.

        Raises:
            BadRequestError: the message names the input, the expected and the actual value.
        """
        count = int(_shared(inputs, "num_inference_steps", self.num_inference_steps))
        guidance = float(_shared(inputs, "guidance_scale", self.guidance_scale))
        if not (np.isfinite(guidance) and guidance >= 0):
            off = " (1 turns it off)" if self.call.guided_by == "null" else ""
            raise BadRequestError(f"guidance_scale: expected a finite number of 0 or more{off}, found {guidance}")
        if self.call.guided_by == "nothing" and guidance > 1:
            raise BadRequestError(f"guidance_scale: this model has no guidance, found {guidance}; leave it out")
        interval = int(_shared(inputs, "preview_every", 0))
        if interval < 0:
            raise BadRequestError(f"preview_every: expected 0 (no previews) or a number of steps, found {interval}")
        name = _shared(inputs, "scheduler", self.scheduler)
        try:
            text = name.decode() if isinstance(name, bytes) else str(name)
            steps = schedules.steps(text, count)
        except UnicodeDecodeError as error:
            raise BadRequestError(
                f"scheduler: expected one of {', '.join(schedules.tables)}, found text that is not UTF-8"
            ) from error
        except ScheduleError as error:
            raise BadRequestError(str(error)) from error
        if seeds.shape != (conditions.count, 1):
            raise BadRequestError(f"seed: expected shape {[conditions.count, 1]}, found {list(seeds.shape)}")
        height, width = (int(_shared(inputs, side.name, side.default)) for side in (self.sizes.height, self.sizes.width))
        shape = (self.shape[0], *self.sizes.latents(height, width))
        latents = self._latents(inputs["latents"], conditions.count, shape) if "latents" in inputs else noise(seeds, shape)
        guided = guidance > 1 and self.call.guided_by == "null"
        if guided and conditions.unguided:
            raise BadRequestError(f"{conditions.unguided}. guidance_scale 1 draws without")
        total = conditions.count * (1 + guided)
        if total > self.max_rows:  # such a job would wait forever
            raise BadRequestError(
                f"{conditions.count} pictures: a guided picture takes two rows of a call; expected at most {self.max_rows} rows"
            )
        rows = partial(self._rows, partial(conditions.rows, guided), total, guidance, (height, width))
        scale = guidance if guided else 1.0
        return Job(client=client, steps=steps, latents=latents, conditions=rows, guidance=scale, preview_interval=interval)

    def _rows(self, conditions: Callable[[], Feed], count: int, guidance: float, size: tuple[int, int]) -> Feed:
        """Return the network's inputs of a job beside latents and timestep, `count` rows of each."""
        words = {"height": size[0], "width": size[1], "aspect": size[0] / size[1]}
        rows = dict(conditions())
        for name, values in self.call.size_values.items():
            row = np.array([[words[value] if isinstance(value, str) else value for value in values]], dtype=np.float32)
            rows[name] = np.repeat(row, count, axis=0)
        if self.call.guided_by == "input":
            rows[GUIDANCE] = np.full(count, guidance, dtype=np.float32)
        return rows

    def _latents(self, values: npt.NDArray[Any], pictures: int, shape: tuple[int, ...]) -> Float32:
        latents: Float32 = np.array(values, dtype=np.float32)
        if shape != self.shape:  # config.pbtxt has this one shape, so that no request can bring one that overflows
            height, width = (self.sizes.pixels * side for side in self.shape[1:])
            raise BadRequestError(f"latents: expected with height {height} and width {width} alone; other sizes need a seed")
        if latents.shape != (pictures, *self.shape):
            raise BadRequestError(f"latents: expected shape {[pictures, *self.shape]}, found {list(latents.shape)}")
        if not np.isfinite(latents).all():
            raise BadRequestError("latents: NaN or Inf; expected finite unit noise")
        return latents


def noise(seeds: UInt64, shape: tuple[int, ...]) -> Float32:
    """Draw float32[n, *shape]. Each picture depends on its own seed and its shape alone; `seeds` is uint64[n, 1]."""
    generators = (np.random.default_rng(int(seed)) for seed in seeds.ravel())
    return np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])


def seeds_of(inputs: Feed, count: int) -> UInt64:
    """Return the request's seeds, or random ones, as uint64[n, 1]."""
    if "seed" in inputs:
        return np.array(inputs["seed"], dtype=np.uint64)
    return np.array([[secrets.randbelow(SAFE_SEED)] for _ in range(count)], dtype=np.uint64)


def _shared(inputs: Feed, name: str, default: Any) -> Any:
    """Return the value that all pictures of a request share."""
    values = list(inputs[name].ravel()) if name in inputs else [default]
    if len(values) == 0 or any(value != values[0] for value in values[1:]):
        raise BadRequestError(f"{name}: expected one value for all pictures of a request; send others in another request")
    return values[0]
