"""What a client may ask for, checked before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .sampler import Client, Job
from .schedules import Float32, ScheduleError, Schedules

Inputs = Mapping[str, npt.NDArray[Any]]
SAFE_SEED = 2**53
"""Seeds that are chosen here stay below it: JSON readers hold numbers as float64."""


class BadRequestError(ValueError):
    """The request asks for what cannot be; the message says what is expected."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model takes, and the defaults of what a request leaves out.

    Args:
        shape: (C, H, W) of one picture's latents.
        classes: labels are 0 to classes - 1; the null label is `classes`.
        max_images: pictures of one request; `max_rows`: rows of one network call.
    """

    shape: tuple[int, int, int]
    classes: int
    max_images: int
    max_rows: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str

    def job(self, inputs: Inputs, schedules: Schedules, seed: int, client: Client) -> Job:
        """The work that a request asks for.

        Args:
            inputs: `class_labels` int64[n]; the others may be absent.

        Raises:
            BadRequestError: with the input, what is expected and what was found.
        """
        labels = self._labels(inputs["class_labels"])
        count = int(_scalar(inputs, "num_inference_steps", self.num_inference_steps))
        guidance = float(_scalar(inputs, "guidance_scale", self.guidance_scale))
        if not (np.isfinite(guidance) and guidance >= 0):
            raise BadRequestError(f"guidance_scale: expected a finite number, 0 or more (1 and less: off), found {guidance}")
        every = int(_scalar(inputs, "preview_every", 0))
        if every < 0:
            raise BadRequestError(f"preview_every: expected 0 (no previews) or more steps, found {every}")
        name = _scalar(inputs, "scheduler", self.scheduler)
        try:
            text = name.decode() if isinstance(name, bytes) else str(name)
            steps = schedules.steps(text, count)
        except UnicodeDecodeError as error:
            raise BadRequestError(f"scheduler: expected one of {', '.join(schedules.tables)}, found no UTF-8 text") from error
        except ScheduleError as error:
            raise BadRequestError(str(error)) from error
        latents = self._latents(inputs["latents"], len(labels)) if "latents" in inputs else self.noise(len(labels), seed)
        job = Job(
            client=client, steps=steps, latents=latents, labels=labels, null=self.classes, guidance=guidance, every=every
        )  # fmt: skip
        if job.rows > self.max_rows:  # it would wait for ever
            raise BadRequestError(f"class_labels: {job.rows} rows, a guided picture is two; expected {self.max_rows} at the most")
        return job

    def noise(self, pictures: int, seed: int) -> Float32:
        """float32[pictures, C, H, W]; picture i is the same however many are asked for."""
        each = [np.random.default_rng([seed, i]).standard_normal(self.shape, dtype=np.float32) for i in range(pictures)]
        return np.stack(each)

    def _labels(self, given: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        labels: npt.NDArray[np.int64] = np.array(given, dtype=np.int64)
        if labels.ndim != 1 or not 1 <= len(labels) <= self.max_images:
            raise BadRequestError(f"class_labels: expected 1 to {self.max_images} labels, found shape {list(labels.shape)}")
        if labels.min() < 0 or labels.max() >= self.classes:
            wrong = [int(label) for label in labels if not 0 <= label < self.classes]
            raise BadRequestError(f"class_labels: expected 0 to {self.classes - 1}, found {', '.join(map(str, wrong))}")
        return labels

    def _latents(self, given: npt.NDArray[Any], pictures: int) -> Float32:
        latents: Float32 = np.array(given, dtype=np.float32)
        if latents.shape != (pictures, *self.shape):
            raise BadRequestError(f"latents: expected shape {[pictures, *self.shape]}, found {list(latents.shape)}")
        if not np.isfinite(latents).all():
            raise BadRequestError("latents: NaN or Inf; expected finite unit noise")
        return latents


def seed_of(inputs: Inputs) -> int:
    """The request's seed, or one of our own choice."""
    return int(_scalar(inputs, "seed", -1)) if "seed" in inputs else secrets.randbelow(SAFE_SEED)


def _scalar(inputs: Inputs, name: str, default: Any) -> Any:
    value = inputs.get(name)
    if value is None:
        return default
    if value.size != 1:
        raise BadRequestError(f"{name}: expected one value, found shape {list(value.shape)}")
    return value.ravel()[0]
