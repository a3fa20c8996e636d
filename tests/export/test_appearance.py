"""How pictures look: LPIPS against torchmetrics, latents that a VAE decodes, the gate, and what is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, recipe_of, save_tiny
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from test_checkpoints import save_vae
from torchmetrics.functional.image import lpips as oracle

import dq_export
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.parity import ParityError
from dq_export.families.lpips import Lpips, require_weights
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.pipeline import run
from dq_export.preparation import Options
from dq_export.report.verdict import require
from dq_export.stages.appearance import appearance, decoded, require_appearance

SIZES = (64, 192, 384, 256, 256)


def alexnet() -> torch.nn.Sequential:
    """torchvision's `alexnet().features`, which has no build for CPUs in the package index that tests install from."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights under the names, and with the layout, of the published files."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    backbone = {f"features.{name}": value for name, value in alexnet().state_dict().items()}
    torch.save({**backbone, "classifier.1.weight": torch.zeros(4, 4)}, folder / "alexnet-owt-7be5be79.pth")
    save_file({f"lin{i}.model.1.weight": torch.rand(1, size, 1, 1) for i, size in enumerate(SIZES)}, folder / "alex.safetensors")
    return folder


def test_lpips_is_that_of_torchmetrics(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_get_tv_model_features", lambda net, pretrained: alexnet())
    network = oracle._NoTrainLpips(pretrained=False, net="alex", pnet_rand=True)
    lpips = Lpips.load(weights)
    for number, index in enumerate((0, 3, 6, 8, 10), start=1):
        convolution = network.net.get_submodule(f"slice{number}.{index}")
        for part in ("weight", "bias"):
            convolution.get_parameter(part).data = lpips.weights[f"features.{index}.{part}"]
        network.get_submodule(f"lin{number - 1}").model[1].weight.data = lpips.weights[f"lin{number - 1}.model.1.weight"]
    random = np.random.default_rng(1)
    exact, actual = random.uniform(-1, 1, (2, 3, 3, 72, 96)).astype(np.float32)
    expected = network(torch.from_numpy(exact), torch.from_numpy(actual)).mean()
    assert lpips(exact, actual) == pytest.approx(float(expected), rel=1e-5)
    assert lpips(exact, exact) == 0
    grey, other = exact[:, :1, :16, :16], actual[:, :1, :16, :16]
    large = [torch.from_numpy(value.repeat(3, 1).repeat(4, 2).repeat(4, 3)) for value in (grey, other)]
    assert lpips(grey, other) == pytest.approx(float(network(*large).mean()), rel=1e-5)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose latents are pictures."""
    return save_tiny(tmp_path_factory.mktemp("grey"), in_channels=1, out_channels=1, sample_size=16)


def test_an_export_compares_looks_and_fails_where_they_are_too_far(grey: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = {**QUICK, "parity_size": 2, "metric_weights": str(weights), "max_lpips": 0}
    report = run(Recipe.parse({"model": str(grey), **values}, "test"), out, Options(), until="verify")
    assert report is not None
    with pytest.raises(ParityError, match=r"^engine: LPIPS 0\.\d{4} of the pictures, allowed 0$"):
        require(report.verdict)
    assert report.parity is not None
    (trajectory,) = report.parity.trajectories
    assert 0 < (trajectory.lpips or 0) < 1
    assert 10 < (trajectory.psnr or 0) < 100
    assert 0 < (trajectory.ssim or 0) < 1
    assert trajectory.appearance() in (out / "report.html").read_text()


def test_latents_are_decoded_by_the_checkpoints_vae(weights: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "latent")
    vae = save_vae(model / "vae", scaling_factor=0.5)
    reference = load_reference(str(model))
    recipe = recipe_of(reference, metric_weights=str(weights))
    assert require_appearance(reference, recipe, None) == ""
    random = np.random.default_rng(2)
    exact = random.standard_normal((2, 2, 8, 8)).astype(np.float32)
    actual = exact + 0.3 * random.standard_normal(exact.shape).astype(np.float32)
    result = appearance(recipe, *decoded(reference, recipe, (exact, actual)), [])
    with torch.inference_mode():
        pictures = [vae.decode(torch.from_numpy(value) / 0.5).sample.clamp(-1, 1) for value in (exact, actual)]
    noise = (pictures[0] - pictures[1]).square().mean(dim=(1, 2, 3))
    assert result["psnr"] == pytest.approx(float((10 * torch.log10(4 / noise)).mean()), abs=1e-3)
    assert result["lpips"] == pytest.approx(Lpips.load(weights)(*(value.numpy() for value in pictures)), rel=1e-4)
    assert isinstance(vae, AutoencoderKL)
    broken = np.full_like(actual, math.nan)
    assert appearance(recipe, *decoded(reference, recipe, (exact, broken)), []) == {"psnr": -200}


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "metric_weights {folder}: no such folder"),
        (without("alex.safetensors"), "metric_weights {folder}: no file of the linear weights of lpips, alex.pth; expected one"),
        (without("alexnet-owt-7be5be79.pth"), "no file of torchvision's AlexNet, alexnet-owt-7be5be79.pth; expected one, as"),
        (lambda folder: (folder / "alexnet.pth").write_bytes(b"x"), "2 files of torchvision's AlexNet"),
        (lambda folder: (folder / "alex.safetensors").write_bytes(b""), "alex.safetensors: empty"),
        (lambda folder: save_file({"lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, folder / "alex.safetensors"),
         "'lin0.model.1.weight' has shape [1, 3, 1, 1], expected [1, 64, 1, 1]"),
        (lambda folder: save_file({"x": torch.zeros(1)}, folder / "alex.safetensors"),
         "'lin0.model.1.weight' is missing, expected [1, 64, 1, 1]"),
    ],
    ids=["no folder", "no linear", "no backbone", "two backbones", "empty", "shape", "other tensors"],
)  # fmt: skip
def test_weights_that_are_not_there_are_refused_in_one_line(
    spoil: Callable[[Path], Any], message: str, weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    spoil(folder)
    with pytest.raises(ModelError) as error:
        require_weights(folder)
    assert message.format(folder=folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_a_decoder_for_its_latents_is_refused(weights: Path, tiny_folder: Path) -> None:
    reference = load_reference(str(tiny_folder))
    with pytest.raises(RecipeError, match="pictures of this model cannot be compared, for its checkpoint has no VAE; leave it"):
        require_appearance(reference, recipe_of(reference, metric_weights=str(weights)), None)


def test_an_export_refuses_missing_weights_before_it_writes(grey: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"metric_weights .*/nothing: no such folder"):
        dq_export.export(model=str(grey), output_dir=tmp_path / "out", metric_weights=str(tmp_path / "nothing"), **QUICK)
