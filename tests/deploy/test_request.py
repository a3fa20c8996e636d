"""How a request is read before anything is computed; answers are tested on a server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import Nobody

from dq_export.deploy.triton.serving.call import Call
from dq_export.deploy.triton.serving.conditions import BadRequestError, Feed, Labels, Texts
from dq_export.deploy.triton.serving.job import Job
from dq_export.deploy.triton.serving.request import SAFE_SEED, Limits, UInt64, noise, seeds_of
from dq_export.deploy.triton.serving.schedules import COLUMNS, Schedules
from dq_export.deploy.triton.serving.sizes import Side, Sizes

LABELS = Labels("class_labels", classes=5, max_images=4)
SIZES = Sizes(
    height=Side(name="height", default=32, minimum=32, maximum=64, step=16),
    width=Side(name="width", default=32, minimum=32, maximum=32, step=16),
    pixels=8,
)
CALL = Call(state="hidden_states", output="sample", timestep="int64", conditions={"class_labels": "class_labels"})
LIMITS = Limits(shape=(2, 4, 4), sizes=SIZES, max_rows=4, num_inference_steps=3, guidance_scale=1.0, scheduler="one", call=CALL)
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


def test_only_calls_without_the_condition_are_turned_off_by_a_scale_of_one() -> None:
    columns = {"class_labels": np.array([[1]]), "guidance_scale": np.array([[-1.0]])}
    for guided_by, expected in (("null", r"0 or more \(1 turns it off\), found -1"), ("input", "0 or more, found -1")):
        limits = replace(LIMITS, call=replace(CALL, guided_by=guided_by))
        with pytest.raises(BadRequestError, match=expected):
            limits.job(columns, LABELS.read(columns), SCHEDULES, seeds(1), Nobody())


def test_without_a_text_encoder_guidance_needs_embeddings_unless_its_condition_is_zeros() -> None:
    call = Call(state="sample", output="out", timestep="int64", conditions={"states": "prompt_embeds"})
    columns = {"prompt_embeds": np.ones((1, 3, 2), np.float32), "guidance_scale": np.array([[2.0]])}

    def encode(tokens: Feed) -> Feed:
        raise AssertionError("there is no encoder")

    def guided(zero_null: bool, inputs: Feed) -> Job:
        texts = Texts(replace(call, zero_null=zero_null), {"prompt_embeds": (3, 2)}, (), encode, max_images=2)
        return replace(LIMITS, call=texts.call).job(inputs, texts.read(inputs), SCHEDULES, seeds(1), Nobody())

    with pytest.raises(BadRequestError, match="negative_prompt_embeds: missing; guidance needs the embeddings of an"):
        guided(False, columns)
    assert guided(False, {**columns, "guidance_scale": np.array([[1.0]])}).rows == 1
    rows = guided(True, columns).feed()[2]["states"]
    assert np.array_equal(rows, [np.ones((3, 2)), np.zeros((3, 2))])
    rows = guided(False, {**columns, "negative_prompt_embeds": np.full((1, 3, 2), 0.5, np.float32)}).feed()[2]["states"]
    assert np.array_equal(rows, [np.ones((3, 2)), np.full((3, 2), 0.5)])
    with pytest.raises(BadRequestError, match="prompt_embeds: missing; this server has no text encoder"):
        guided(False, {"guidance_scale": columns["guidance_scale"]})


def test_more_rows_than_a_call_has_are_refused_rather_than_waited_for() -> None:
    assert job(class_labels=[1, 2, 3]).rows == 3
    with pytest.raises(BadRequestError, match="3 pictures: a guided picture takes two rows of a call; expected at most 4 rows"):
        job(class_labels=[1, 2, 3], guidance_scale=2.0)


def test_a_pictures_noise_is_its_own_and_its_seeds() -> None:
    pictures = noise(seeds(7, 8, 9), (2, 4, 4))
    assert pictures.dtype == np.float32
    assert np.array_equal(noise(seeds(8), (2, 4, 4)), pictures[1:2])
    assert len({picture.tobytes() for picture in (*pictures, *noise(seeds(10, 2**63), (2, 4, 4)))}) == 5
    assert noise(seeds(2**64 - 1), (2, 4, 4)).shape == (1, 2, 4, 4)
    values = noise(seeds(0), (4, 64, 64))
    assert abs(values.mean()) < 4 / values.size**0.5  # four standard errors of unit noise
    assert abs(values.std() - 1) < 4 / (2 * values.size) ** 0.5


def test_given_latents_take_the_noises_place() -> None:
    noise = np.ones((1, 2, 4, 4), dtype=np.float32)
    assert np.array_equal(job(class_labels=[1], latents=noise).latents, 0.5 * noise)  # the table's noise factor


def test_a_request_chooses_its_size_and_latents_come_at_the_exported_one() -> None:
    assert job(class_labels=[1, 2], height=48).latents.shape == (2, 2, 6, 4)
    assert job(class_labels=[1], height=64, width=32).latents.shape == (1, 2, 8, 4)
    with pytest.raises(BadRequestError, match="height: expected one value"):
        job(class_labels=[1, 2], height=[32, 48])
    with pytest.raises(BadRequestError, match="latents: expected with height 32 and width 32 alone; other sizes need a seed"):
        job(class_labels=[1], height=48, latents=np.ones((1, 2, 4, 4)))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 50}, "height 50: expected 32 to 64 in steps of 16; the nearest are 48 and 64"),
        ({"height": 16}, "height 16: expected 32 to 64 in steps of 16; the nearest is 32"),
        ({"height": 1000}, "height 1000: expected 32 to 64 in steps of 16; the nearest is 64"),
        ({"height": -(2**31)}, "height -2147483648: expected 32 to 64 in steps of 16; the nearest is 32"),
        ({"width": 48}, "width 48: expected 32, the only width that this model was exported for"),
    ],
)
def test_a_size_that_is_not_drawn_is_refused_with_the_nearest(size: dict[str, int], message: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        job(class_labels=[1], **size)
    assert str(caught.value) == message


def test_a_network_that_reads_the_pictures_size_gets_it_in_every_row() -> None:
    columns = {"class_labels": np.array([[1], [2]]), "height": np.array([[64], [64]])}
    limits = replace(LIMITS, call=replace(CALL, size_values={"time_ids": ("height", "width", 0, "aspect")}))
    feed = limits.job(columns, LABELS.read(columns), SCHEDULES, seeds(1, 2), Nobody()).feed()[2]
    assert feed["time_ids"].dtype == np.float32
    assert feed["time_ids"].tolist() == [[64, 32, 0, 2]] * 2


def test_sizes_are_read_from_the_parameters_of_a_config() -> None:
    values = {key: str(value) for key, value in SIZES.parameters.items()}
    assert Sizes.of(values) == SIZES
    for changed, message in (
        ({"height": "80"}, "height 80: expected 32 to 64 in steps of 16; the nearest is 64"),
        ({"max_height": "70"}, "max_height 70 is not a multiple of size_step 16"),
        ({"latent_pixels": "3"}, "size_step 16 is not a multiple of latent_pixels 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Sizes.of({**values, **changed})


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
