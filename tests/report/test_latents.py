"""The report of a network that samples latents: its pictures are those that the checkpoint's VAE decodes."""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import QUICK, save_tiny
from diffusers import AutoencoderKL
from json_file import edit
from onnxruntime import InferenceSession
from tiny_vae import save_vae

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.tensor_file import load_tensors
from dq_export.deploy.backends import backend_of
from dq_export.families.decoder import decoding_bytes, load_vae
from dq_export.families.reference import Float32, ModelError
from dq_export.families.source import load_reference
from dq_export.finished_folder import FinishedFolder, engine_of
from dq_export.memory import BASE, GIB
from dq_export.pipeline import run
from dq_export.preparation import Options
from dq_export.report.report import Report
from dq_export.stages import appearance
from dq_export.stages.recording import draw, feed_of

SCALE, MEAN, STD = 0.3, (0.4, -0.2), (1.5, 0.6)
LEVEL = 1 + 1e-3
"""Of 255: float32 may round a value between two levels to either."""


def exported(model: Path, out: Path, options: Options | None = None, **values: Any) -> Report:
    recipe = Recipe.parse({"model": str(model), **QUICK, "bits": "w4a4", "parity_size": 6, **values}, "test")
    report = run(recipe, out, options or Options(overwrite=True), until="verify")
    assert report is not None
    return report


def rows_of(out: Path, side: int, count: int) -> npt.NDArray[np.float64]:
    """The pictures float64[3, count, side, side, 3] of `parity/pictures.png`, 0 to 255."""
    from PIL import Image

    pixels = np.asarray(Image.open(out / "parity" / "pictures.png").convert("RGB"), dtype=np.float64)
    factor = max(1, 64 // side)
    assert pixels.shape == (factor * 3 * (side + 2), factor * count * (side + 2), 3)
    frames = pixels[::factor, ::factor].reshape(3, side + 2, count, side + 2, 3).transpose(0, 2, 1, 3, 4)
    return frames[:, :, 1:-1, 1:-1]


def pixels_of(vae: Any, latents: Float32, mean: Any, std: Any) -> npt.NDArray[np.float64]:
    """What StableDiffusionXLPipeline makes of latents, float64[N, H, W, 3] from 0 to 255."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    with torch.inference_mode():
        pictures = vae.decode(torch.from_numpy(latents) * std / vae.config.scaling_factor + mean, return_dict=False)[0]
    return np.asarray((pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255, dtype=np.float64)


def drawn_by_the_engine(out: Path, recipe: Recipe) -> Float32:
    backend, reference = backend_of(recipe), load_reference(recipe.model)
    assert backend is not None
    engine = backend.load(engine_of(out))
    return draw(reference, lambda feed: engine(feed_of(feed, recipe)), recipe)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("latents"))
    save_vae(folder / "vae", scaling_factor=SCALE, latents_mean=MEAN, latents_std=STD)
    return folder


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    exported(model, folder)
    return folder


def test_the_pictures_are_those_that_the_vae_decodes(model: Path, out: Path) -> None:
    folder = FinishedFolder.open(out)
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    sampled = load_tensors(out / "parity" / "pytorch.safetensors")[0]["pictures"]
    exact, actual = (pixels_of(vae, latents[:4], MEAN, STD) for latents in (sampled, drawn_by_the_engine(out, folder.recipe())))
    rows = rows_of(out, 16, 4)
    assert np.abs(rows[0] - exact).max() < LEVEL
    assert np.abs(rows[1] - actual).max() < LEVEL
    assert np.abs(rows[2] - np.clip(127.5 + 4 * (actual - exact), 0, 255)).max() < LEVEL
    assert exact.std() > 3
    assert np.abs(rows[0] - rows[1]).max() > 2 * LEVEL, "an engine of four bits is not exact"


def test_the_report_shows_the_first_pictures_and_says_what_made_them(out: Path) -> None:
    report = FinishedFolder.open(out).report()
    assert report.pictures is not None
    assert report.pictures.shown == 4
    assert len(report.drawn) == 6
    page = (out / "report.html").read_text(encoding="utf-8")
    strip = page[page.index('<figure class="strip">') : page.index("</figure>")]
    assert "data:image/png;base64," in strip
    assert re.findall(r"<span>(\d)</span>", strip) == ["0", "1", "2", "3"]
    assert "<p>" not in strip
    text = "The checkpoint&#39;s VAE decoded these pictures, the first 4 of 6."
    assert page.index(text) > page.index("</figure>")


def test_another_vae_draws_again_and_the_same_one_does_not(
    model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[int] = []

    def load(*arguments: Any) -> Any:
        sessions.append(sum(type(item) is InferenceSession for item in gc.get_objects()))
        return load_vae(*arguments)

    monkeypatch.setattr(appearance, "load_vae", load)
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(model, tmp_path / "model")
    exported(model, tmp_path / "out")
    before = (tmp_path / "out" / "parity" / "pictures.png").stat().st_mtime_ns
    exported(model, tmp_path / "out")
    assert (tmp_path / "out" / "parity" / "pictures.png").stat().st_mtime_ns == before
    before_any = sum(type(item) is InferenceSession for item in gc.get_objects())
    edit(tmp_path / "model" / "vae" / "config.json", latents_mean=None, latents_std=None, shift_factor=0.25)
    exported(tmp_path / "model", tmp_path / "out")
    vae = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae").eval()
    sampled = load_tensors(tmp_path / "out" / "parity" / "pytorch.safetensors")[0]["pictures"]
    assert sessions == [before_any], "the engine is freed before the VAE is loaded"
    exact = pixels_of(vae, sampled[:4], (0.25, 0.25), (1.0, 1.0))
    assert np.abs(rows_of(tmp_path / "out", 16, 4)[0] - exact).max() < LEVEL


def no_weights(vae: Path) -> None:
    for path in vae.glob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shutil.rmtree, "Its checkpoint has no VAE"),
        (no_weights, r"Its VAE is incomplete \(.*/vae: no weights; expected diffusion_pytorch_model.*\)"),
        (lambda vae: (vae / "config.json").unlink(), r"Its VAE has no config\.json"),
        (lambda vae: edit(vae / "config.json", _class_name="AutoencoderDC"),
         "Its VAE is of class 'AutoencoderDC', not AutoencoderKL or AutoencoderKLFlux2"),
        (lambda vae: edit(vae / "config.json", latent_channels=4, latents_mean=None, latents_std=None),
         "Its VAE takes latents of 4 channels, and the network draws 2"),
    ],
    ids=["none", "no weights", "no configuration", "another class", "other latents"],
)  # fmt: skip
def test_without_a_vae_the_report_says_why_there_are_no_pictures(
    spoil: Callable[[Path], Any], reason: str, model: Path, out: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    spoil(tmp_path / "model" / "vae")
    shutil.copytree(out, tmp_path / "out")
    report = exported(tmp_path / "model", tmp_path / "out")
    assert report.pictures is not None
    assert report.pictures.shown == 0
    assert re.fullmatch(f"{reason}, so no pictures are drawn\\.", report.pictures.origin)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "data:image/png" not in page
    assert ", so no pictures are drawn.</p>" in page
    assert not (tmp_path / "out" / "parity" / "pictures.png").exists()


def test_latents_with_the_channels_of_pictures_are_drawn_where_there_is_no_vae(tmp_path: Path) -> None:
    report = exported(save_tiny(tmp_path / "model", in_channels=3, out_channels=3), tmp_path / "out")
    assert report.pictures is not None
    assert (report.pictures.shown, report.pictures.origin) == (6, "Its checkpoint has no VAE, so the latents are drawn.")
    sampled = load_tensors(tmp_path / "out" / "parity" / "pytorch.safetensors")[0]["pictures"]
    expected = np.clip(sampled.transpose(0, 2, 3, 1) * 127.5 + 127.5, 0, 255)
    assert np.abs(rows_of(tmp_path / "out", 8, 6)[0] - expected).max() < LEVEL


def test_a_damaged_vae_is_refused_before_anything_is_done(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors: cut short"):
        exported(tmp_path / "model", tmp_path / "out")
    edit(tmp_path / "model" / "vae" / "config.json", latents_std=[1.0])
    with pytest.raises(ModelError, match=r"vae/config\.json: latents_std: expected 2 numbers, one for each of latent_channels"):
        exported(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_that_do_not_fit_into_memory_are_left_out(tmp_path: Path) -> None:
    """A decoder as wide as a published one, for pictures of 512 pixels, beside a network of kilobytes."""
    model = save_tiny(tmp_path / "model", sample_size=16, patch_size=4)
    wide: dict[str, Any] = {"block_out_channels": (32, 512, 32, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 32}
    save_vae(model / "vae", **wide)
    needed = BASE + decoding_bytes(model / "vae", (2, 16, 16)) / GIB
    assert 3 < needed < 4, "4.4 times 512 channels of 512 x 512 pixels are 2.2 GiB"
    report = exported(model, tmp_path / "out", Options(max_memory=2), parity_size=1)
    assert report.pictures is not None
    expected = f"Its VAE takes {needed:.1f} GiB to decode, and --max-memory is 2, so no pictures are drawn."
    assert report.pictures.origin == expected
    with pytest.raises(RecipeError, match="a number of GiB above 0"):
        exported(model, tmp_path / "other", Options(max_memory=-1))
