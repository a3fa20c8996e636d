"""How a request is read before anything is computed; answers are tested on a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Nobody

from dq_export.deploy.triton.serving.conditions import BadRequestError, Labels
from dq_export.deploy.triton.serving.request import SAFE_SEED, Limits, UInt64, seeds_of
from dq_export.deploy.triton.serving.sampler import Job
from dq_export.deploy.triton.serving.schedules import COLUMNS, Schedules

LABELS = Labels("class_labels", classes=5, max_images=4)
LIMITS = Limits(shape=(2, 4, 4), max_rows=4, num_inference_steps=3, guidance_scale=1.0, scheduler="one")
SCHEDULES = Schedules({name: np.full((10, len(COLUMNS)), 0.5) for name in ("one", "other")})


def seeds(*values: int) -> UInt64:
    return np.array(values, dtype=np.uint64)[:, None]


def job(**inputs: Any) -> Job:
    """A single value becomes one row per label; arrays of two and more dimensions stay as they are."""
    rows = len(inputs["class_labels"])
    columns = {name: np.asarray(value) for name, value in inputs.items()}
    columns = {name: np.broadcast_to(v.reshape(-1, 1), (rows, 1)) if v.ndim < 2 else v for name, v in columns.items()}
    return LIMITS.job(columns, LABELS.read(columns), SCHEDULES, seeds(*range(rows)), Nobody())


def test_optional_inputs_have_the_models_defaults() -> None:
    job_ = job(class_labels=[1, 2])
    assert (len(job_.steps), job_.guidance, job_.preview_interval, job_.rows) == (3, 1.0, 0, 2)
    assert job_.feed()[2]["class_labels"].tolist() == [1, 2]
    job_ = job(class_labels=[1, 2], num_inference_steps=2, guidance_scale=1.5, preview_every=1, scheduler=b"other")
    assert (len(job_.steps), job_.guidance, job_.preview_interval, job_.rows) == (2, 1.5, 1, 4)
    assert job_.feed()[2]["class_labels"].tolist() == [1, 2, 5, 5]


def test_more_rows_than_a_call_has_are_refused_rather_than_waited_for() -> None:
    assert job(class_labels=[1, 2, 3]).rows == 3
    with pytest.raises(BadRequestError, match="3 pictures: a guided picture takes two rows of a call; expected at most 4 rows"):
        job(class_labels=[1, 2, 3], guidance_scale=2.0)


def test_a_pictures_noise_is_its_own_and_its_seeds() -> None:
    noise = LIMITS.noise(seeds(7, 8, 9))
    assert noise.dtype == np.float32
    assert np.array_equal(LIMITS.noise(seeds(8)), noise[1:2])
    assert len({picture.tobytes() for picture in (*noise, *LIMITS.noise(seeds(10, 2**63)))}) == 5
    assert LIMITS.noise(seeds(2**64 - 1)).shape == (1, 2, 4, 4)
    limits = Limits(**{**vars(LIMITS), "shape": (4, 64, 64)}).noise(seeds(0))
    assert abs(limits.mean()) < 4 / limits.size**0.5  # four standard errors of unit noise
    assert abs(limits.std() - 1) < 4 / (2 * limits.size) ** 0.5


def test_given_latents_take_the_noises_place() -> None:
    noise = np.ones((1, 2, 4, 4), dtype=np.float32)
    assert np.array_equal(job(class_labels=[1], latents=noise).latents, 0.5 * noise)  # the table's noise factor


def test_an_absent_seed_is_one_that_json_can_hold() -> None:
    chosen = seeds_of({}, 100)
    assert (chosen.shape, chosen.dtype) == ((100, 1), np.uint64)
    assert len(set(chosen.ravel().tolist())) == 100
    assert all(0 <= seed < SAFE_SEED for seed in chosen.ravel().tolist())
    assert seeds_of({"seed": seeds(2**64 - 1)}, 1).tolist() == [[2**64 - 1]]


@pytest.mark.parametrize("shape", [(1,), (0, 1), (5, 1), (1, 2), (1, 1, 1), ()])
def test_labels_of_another_shape_are_refused_although_the_server_let_them_pass(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRequestError, match=r"expected shape .n, 1. with n from 1 to 4, found"):
        LABELS.read({"class_labels": np.ones(shape, dtype=np.int64)})


def test_inputs_without_rows_or_with_other_rows_are_refused() -> None:
    with pytest.raises(BadRequestError, match="num_inference_steps: expected one value"):
        job(class_labels=[1], num_inference_steps=np.zeros((0, 1)))
    two = LABELS.read({"class_labels": np.ones((2, 1), dtype=np.int64)})
    with pytest.raises(BadRequestError, match=r"expected shape .2, 1., found .1, 1."):
        LIMITS.job({}, two, SCHEDULES, seeds(1), Nobody())
