"""XL's refiner, which continues a picture: what calibration draws, and an engine in diffusers' pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import recipe_of
from PIL import Image
from test_unet import encoded
from tiny_vae import save_vae
from toy import PROMPTS
from unet import REFINER, XL, drawn_by_both, drawn_by_reference, drawn_by_unet_pipeline, save_unet

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.pipeline import run
from dq_export.stages.triton import require_served

SEED = 3
QUICK = {"format": "ort", "bits": "w8a8", "steps": 4, "parity_size": 1, "guidance_scale": 2.0, "calib_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet(tmp_path_factory.mktemp("refiner"), **REFINER)


def test_calibration_takes_random_pictures_through_the_last_steps(folder: Path) -> None:
    reference = encoded(folder)
    reference.draw_at(256, 192)
    noise, chosen = reference.noise(3, SEED), np.arange(3)
    feeds, latents = drawn_by_reference(reference, noise, chosen)
    exact = drawn_by_unet_pipeline(folder, reference, chosen, 2.0, SEED)
    assert np.abs(latents - exact).max() <= 1e-5 * np.abs(exact).max()
    times = [float(feed["timestep"][0]) for feed in feeds]
    assert times == reference.timesteps(4) == [214, 143, 72, 1], "the last 4 of 14"
    for feed in feeds:
        assert feed["time_ids"].tolist() == [[256, 192, 0, 0, 2.5]] * 3 + [[256, 192, 0, 0, 6]] * 3, "the scores of the pipeline"
    assert reference.conditions.null["encoder_hidden_states"].any(), "the prompt '', not zeros"
    assert list(reference.conditions.arrays["encoder_hidden_states"].shape) == [len(PROMPTS), 77, REFINER["cross_attention_dim"]]
    first = feeds[0]["sample"][:3]
    signal = float(reference.scheduler.alphas_cumprod[214])
    patches = first.reshape(3, 4, 8, 4, 8, 3)
    within, between = patches.var((3, 5)).mean() * 12 / 11, patches.mean((3, 5)).var()
    assert within == pytest.approx(1 - signal, rel=0.1), "noise on patches of one colour"
    assert between == pytest.approx(signal + (1 - signal) / 12, rel=0.2), "whose colours have the variance 1"
    alone, _ = drawn_by_reference(reference, noise[1:2], chosen[1:2], guidance=1.0)
    np.testing.assert_array_equal(alone[0]["sample"], first[1:2], "alone as beside others")


def test_the_engine_stands_in_for_pipe_unet_of_the_refiners_pipeline(folder: Path, tmp_path: Path) -> None:
    """With a picture, a prompt and a VAE, as a user calls it, also at another strength than calibration's."""
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    vae = save_vae(model / "vae", latent_channels=4, block_out_channels=(8,) * 4, sample_size=64)
    report = run(Recipe.parse({"model": str(model), **QUICK}, "test"), tmp_path / "out", until="verify")
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    stand_in = dq_export.load(tmp_path / "out")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for strength in (0.3, 0.5):
        arguments = {"image": picture, "strength": strength, "num_inference_steps": 10, "guidance_scale": 2.0}
        exact, actual = drawn_by_both(model, vae, stand_in, **arguments)
        assert exact.shape == (1, 3, 64, 64)
        assert 0 < (actual - exact).abs().max() < 0.1 * exact.std()
    with pytest.raises(TypeError, match=r"misses added_cond_kwargs\.text_embeds, added_cond_kwargs\.time_ids"):
        stand_in(torch.zeros(2, 4, 8, 8), 5, torch.zeros(2, 77, REFINER["cross_attention_dim"]))


def test_a_server_is_refused(folder: Path) -> None:
    reference: Any = load_reference(str(folder))
    with pytest.raises(ModelError, match=r"requests do not hold what this network takes: time_ids\. Leave --triton out"):
        require_served(recipe_of(reference), reference)


def test_the_refiners_pipeline_without_the_refiner_encodes_with_what_it_has(folder: Path, tmp_path: Path) -> None:
    base = save_unet(tmp_path / "base", **XL)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLImg2ImgPipeline"}))
    reference: Any = load_reference(str(base))
    exact = encoded(save_unet(tmp_path / "same", **XL)).conditions
    conditions = reference.encode(PROMPTS, "cpu")
    for name, rows in exact.arrays.items():
        np.testing.assert_array_equal(conditions.arrays[name], rows)
    shutil.rmtree(base / "unet")
    shutil.copytree(folder / "unet", base / "unet")
    with pytest.raises(ModelError, match="the outputs of its text encoders do not fit its network"):
        load_reference(str(base)).encode(PROMPTS, "cpu")
