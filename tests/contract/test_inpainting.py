"""Networks that also read a mask and a picture around it: what calibration draws, and an engine in diffusers' pipelines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_of
from json_file import edit
from PIL import Image
from test_unet import encoded
from tiny_vae import save_vae
from toy import PROMPTS
from unet import INPAINT, XL, drawn_by_both, drawn_by_reference, drawn_by_unet_pipeline, save_unet

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.pipeline import run
from dq_export.search.trajectories import Trajectories
from dq_export.stages.triton import require_served

SEED = 3
QUICK = {"format": "ort", "bits": "w8a8", "steps": 4, "parity_size": 2, "guidance_scale": 2.0, "calib_size": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet(tmp_path_factory.mktemp("plain"), **INPAINT)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet(tmp_path_factory.mktemp("xl"), **INPAINT, **XL)


def states_of(reference: Any, noise: Any, *, guidance: float = 2.0) -> tuple[list[Any], Any]:
    """What the network reads beside conditions in each call, and the latents that are drawn."""
    feeds, latents = drawn_by_reference(reference, noise, np.arange(len(noise)) % len(PROMPTS), guidance=guidance)
    return [feed["sample"] for feed in feeds], latents


@pytest.mark.parametrize("name", ["plain", "xl"])
def test_calibration_continues_random_pictures_in_random_masks(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    reference = encoded(folder)
    reference.draw_at(128, 96)
    assert reference.feed_shape == (4, 16, 12)
    noise = reference.noise(3, SEED)
    states, latents = states_of(reference, noise)
    exact = drawn_by_unet_pipeline(folder, reference, np.arange(3), 2.0, SEED)
    assert latents.shape == noise.shape
    assert np.abs(latents - exact).max() <= 1e-5 * np.abs(exact).max()
    np.testing.assert_array_equal(states[0][:3, :4], noise)
    mask, around = states[0][:3, 4:5], states[0][:3, 5:]
    for rows in states:
        assert rows.shape == (6, 9, 16, 12)
        np.testing.assert_array_equal(
            rows[:, 4:], np.tile(states[0][:3, 4:], (2, 1, 1, 1)), "in all calls, with and without prompt"
        )
    assert set(np.unique(mask)) == {0, 1}
    for picture in mask[:, 0]:
        rows, columns = (np.flatnonzero(picture.any(axis)) for axis in (1, 0))
        assert picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "one rectangle"
        assert 4 <= len(rows) <= 12
        assert 3 <= len(columns) <= 9
    assert not (around * mask).any()
    assert ((around != 0) == (mask == 0)).all()
    assert len(np.unique(np.concatenate([mask, around], axis=1), axis=0)) == 3
    states, _ = states_of(reference, noise[1:2], guidance=1.0)
    np.testing.assert_array_equal(states[0][:, 4:], np.concatenate([mask, around], axis=1)[1:2], "alone as beside others")


def test_a_search_compares_latents_without_mask_and_picture(plain: Path, tmp_path: Path) -> None:
    reference, noise, nothing = encoded(plain), np.ones((2, 4, 8, 8), dtype=np.float32), np.zeros(0, dtype=np.float32)
    unused: Any = None
    latents = Trajectories(
        reference=reference, space=unused, recipe=recipe_of(reference, steps=3), simulations=(), noise=noise,
        conditions=np.asarray([0, 1]), exact=nothing, journal=tmp_path / "journal",
    ).latents(reference.forward)  # fmt: skip
    assert latents.shape == (4, 2, 4, 8, 8)


@pytest.mark.parametrize("name", ["plain", pytest.param("xl", marks=pytest.mark.slow)])
def test_the_engine_stands_in_for_pipe_unet_of_an_inpainting_pipeline(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With pictures, masks, prompts and a VAE, as a user calls it."""
    model = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "model"))
    vae = save_vae(model / "vae", latent_channels=4, block_out_channels=(8,) * 4, sample_size=64)
    report = run(Recipe.parse({"model": str(model), **QUICK}, "test"), tmp_path / "out", until="verify")
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert report.pictures is not None
    assert report.pictures.origin.startswith("The checkpoint's VAE decoded"), "latents without the mask"
    stand_in = dq_export.load(tmp_path / "out")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.fromarray(np.kron(np.eye(2), np.full((32, 32), 255)).astype(np.uint8))
    arguments = {"image": picture, "mask_image": mask, "height": 64, "width": 64, "strength": 0.8, "guidance_scale": 2.0}
    exact, actual = drawn_by_both(model, vae, stand_in, num_inference_steps=5, **arguments)
    assert exact.shape == (1, 3, 64, 64)
    assert 0 < (actual - exact).abs().max() < 0.1 * exact.std()
    with pytest.raises(ValueError, match=r"sample has shape \[2, 4, 8, 8\], and the network takes \[batch.*, 9, "):
        stand_in.run({**{item.name: item.zeros(2) for item in stand_in.inputs}, "sample": np.zeros((2, 4, 8, 8))})


def test_a_server_is_refused(plain: Path) -> None:
    reference: Any = load_reference(str(plain))
    message = "requests do not hold what this network takes: the mask and the picture in sample. Leave --triton out"
    with pytest.raises(ModelError, match=message):
        require_served(recipe_of(reference), reference)


@pytest.mark.parametrize("channels", [5, 8])
def test_networks_that_read_other_pictures_are_refused(channels: int, plain: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(plain, tmp_path / "model"))
    edit(model / "unet" / "config.json", in_channels=channels)
    with pytest.raises(
        ModelError, match=rf"in_channels {channels}: expected out_channels 4, or 9 for 4, those of inpainting; .*depth"
    ):
        load_reference(str(model))
