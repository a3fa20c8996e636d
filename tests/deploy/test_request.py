"""What becomes of a request before anything is computed; what a server answers is tested on one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Nobody

from dq_export.deploy.triton.serving.request import SAFE_SEED, BadRequestError, Limits, seed_of
from dq_export.deploy.triton.serving.sampler import Job
from dq_export.deploy.triton.serving.schedules import COLUMNS, Schedules

LIMITS = Limits(shape=(2, 4, 4), classes=5, max_images=4, max_rows=4, num_inference_steps=3, guidance_scale=1.0, scheduler="one")
SCHEDULES = Schedules({name: np.full((10, len(COLUMNS)), 0.5) for name in ("one", "other")})


def job(seed: int = 1, **inputs: Any) -> Job:
    return LIMITS.job({name: np.atleast_1d(value) for name, value in inputs.items()}, SCHEDULES, seed, Nobody())


def test_what_is_left_out_is_the_models() -> None:
    made = job(class_labels=[1, 2])
    assert (len(made.steps), made.guidance, made.every, made.null, made.rows) == (3, 1.0, 0, 5, 2)
    made = job(class_labels=[1, 2], num_inference_steps=2, guidance_scale=1.5, preview_every=1, scheduler=b"other")
    assert (len(made.steps), made.guidance, made.every, made.rows) == (2, 1.5, 1, 4)


def test_more_rows_than_a_call_has_are_refused_rather_than_waited_for() -> None:
    assert job(class_labels=[1, 2, 3]).rows == 3
    with pytest.raises(BadRequestError, match="6 rows, a guided picture is two; expected 4 at the most"):
        job(class_labels=[1, 2, 3], guidance_scale=2.0)


def test_a_pictures_noise_is_its_own_and_its_seeds() -> None:
    noise = LIMITS.noise(3, 7)
    assert noise.dtype == np.float32
    assert np.array_equal(LIMITS.noise(1, 7), noise[:1])
    assert len({picture.tobytes() for picture in (*noise, *LIMITS.noise(3, 8))}) == 6
    assert LIMITS.noise(1, 2**64 - 1).shape == (1, 2, 4, 4)
    many = Limits(**{**vars(LIMITS), "shape": (4, 64, 64)}).noise(1, 0)
    assert abs(many.mean()) < 4 / many.size**0.5  # four standard errors of unit noise
    assert abs(many.std() - 1) < 4 / (2 * many.size) ** 0.5


def test_given_latents_take_the_noises_place() -> None:
    given = np.ones((1, 2, 4, 4), dtype=np.float32)
    assert np.array_equal(job(class_labels=[1], latents=given).latents, 0.5 * given)  # the table's noise factor


def test_an_absent_seed_is_one_that_json_can_hold() -> None:
    seeds = {seed_of({}) for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < SAFE_SEED for seed in seeds)
    assert seed_of({"seed": np.array([2**64 - 1], dtype=np.uint64)}) == 2**64 - 1
