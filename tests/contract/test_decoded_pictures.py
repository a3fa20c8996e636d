"""The pictures of a report are those that diffusers' own pipeline gives: its VAE's scaling, and tokens laid out as latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, SEED, loaded
from conftest import recipe_of
from flux import flux_pipeline
from flux2 import flux2_pipeline
from json_file import edit
from sd3 import sd3_pipeline
from tiny_vae import save_flux2_vae, save_vae
from toy import PROMPTS
from unet import unet_pipeline

from dq_export.families.decoder import TILE, decoding_bytes, load_vae, pictures_of
from dq_export.families.reference import ModelError
from dq_export.stages.appearance import decoded

WIDE: dict[str, Any] = {"block_out_channels": (8,) * 4, "sample_size": 32}
"""A latent has 8 pixels along a side, as in published checkpoints."""


@pytest.mark.parametrize(
    ("name", "pipeline_of", "options"),
    [
        ("flux", flux_pipeline, {"latent_channels": 2, "scaling_factor": 0.36, "shift_factor": 0.5}),
        ("sd3", sd3_pipeline, {"latent_channels": 4, "scaling_factor": 1.53, "shift_factor": -0.4}),
        (
            "unet-xl",
            unet_pipeline,
            {"latent_channels": 4, "latents_mean": [0.5, -1, 0.2, 0], "latents_std": [2.0, 1, 0.5, 3], "scaling_factor": 0.5},
        ),
    ],
)
def test_pictures_are_those_of_diffusers_pipeline(
    name: str, pipeline_of: Callable[[Path], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES[name]
    folder = case.save(tmp_path / "model")
    vae = save_vae(folder / "vae", **WIDE, **options)
    reference = loaded(folder, case)
    height, width = case.size or (64, 64)
    pipeline = pipeline_of(folder)
    pipeline.vae = vae

    def output(kind: str) -> Any:
        noise = torch.from_numpy(reference.noise(2, SEED))
        settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": height, "width": width, "output_type": kind}
        return pipeline(list(PROMPTS[:2]), latents=noise, generator=torch.Generator().manual_seed(0), **settings).images.numpy()

    latents, expected = output("latent"), output("pt")
    exact, engines = decoded(reference, recipe_of(reference), (latents, -latents))
    assert expected.shape == (2, 3, height, width)
    assert expected.std() > 0.03
    np.testing.assert_allclose(exact / 2 + 0.5, expected, atol=1e-5)
    assert np.abs(engines - exact).max() > 0.1


def test_flux2s_pictures_are_those_of_diffusers_pipeline(tmp_path: Path) -> None:
    """The VAE's batch norm has the scales, and unpacks 2 x 2 latents of each token."""
    case = CASES["flux2"]
    folder = case.save(tmp_path / "model")
    vae = save_flux2_vae(folder / "vae", 8, decoder_block_out_channels=(8, 4, 8, 8), batch_norm_eps=0.1)
    reference = loaded(folder, case)
    assert case.size
    noise = reference.noise(2, SEED)
    tokens = reference.draw(reference.forward, noise, np.arange(2), steps=2, guidance=1.0)
    pipeline = flux2_pipeline(folder)
    pipeline.vae = vae
    height, width = case.size
    packed = torch.from_numpy(noise).transpose(1, 2).unflatten(2, (height // 16, width // 16))
    expected = pipeline(
        prompt=list(PROMPTS[:2]), latents=packed, num_inference_steps=2, height=height, width=width, output_type="pt"
    ).images.numpy()
    exact, engines = decoded(reference, recipe_of(reference), (tokens, -tokens))
    assert expected.shape == (2, 3, height, width)
    assert expected.std() > 0.03
    np.testing.assert_allclose(exact / 2 + 0.5, expected, atol=1e-5)
    assert np.abs(engines - exact).max() > 0.1
    assert decoding_bytes(folder / "vae", (8, 4, 6)) > 4 * (4.3 * height * width * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": [3, 3]}, r"config\.json: patch_size\[0\] = 3: expected 2"),
        ({"decoder_block_out_channels": [8, 8]}, r"config\.json: decoder_block_out_channels: expected 4 of them"),
        ({"decoder_block_out_channels": [8, 8, 8, 6]}, r"decoder_block_out_channels 6: expected a multiple of norm_num_groups 4"),
        ({"batch_norm_eps": "x"}, r"config\.json: batch_norm_eps = 'x': expected a valid number"),
        ({"latent_channels": 4}, r"config\.json and weights do not fit each other"),
    ],
)
def test_a_vae_of_flux2_with_such_values_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_flux2_vae(tmp_path / "vae", 8)
    edit(tmp_path / "vae" / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_vae(tmp_path / "vae", None)


def test_a_variance_below_zero_is_a_damaged_vae(tmp_path: Path) -> None:
    vae = save_flux2_vae(tmp_path / "vae", 8)
    vae.bn.running_var[3] = -1.0
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match=r"the VAE decodes zeros to NaN or Inf; the checkpoint is damaged$"):
        load_vae(tmp_path / "vae", (8, 4, 4))


def test_large_pictures_are_decoded_in_tiles_as_diffusers_does_it(tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae", **WIDE, latent_channels=4, scaling_factor=0.5)
    latents = np.random.default_rng(0).normal(size=(2, 4, 72, 40)).astype(np.float32)
    counted: list[tuple[int, int]] = []
    network = load_vae(tmp_path / "vae", (4, 72, 40))
    pictures = pictures_of(network, latents, lambda done, total, unit: counted.append((done, total)))
    assert counted == [(1, 2), (2, 2)]
    scaled = torch.from_numpy(latents / 0.5).split(1)
    with torch.inference_mode():
        whole = np.concatenate([vae.decode(sample).sample.numpy() for sample in scaled])
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 8
        tiled = np.concatenate([vae.decode(sample).sample.numpy() for sample in scaled])
    assert pictures.shape == (2, 3, 576, 320)
    np.testing.assert_allclose(pictures, tiled, atol=1e-5)
    assert np.abs(pictures - whole).max() > 1e-3
    sizes = [decoding_bytes(tmp_path / "vae", (4, side, side)) for side in (32, 64, 128)]
    assert sizes[0] < sizes[1] == sizes[2], "tiles take the memory of one"
