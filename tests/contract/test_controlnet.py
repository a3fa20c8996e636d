"""Networks that take a ControlNet's residuals: what calibration draws, and an engine in diffusers' pipelines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import recipe_of
from json_file import edit
from test_unet import encoded
from tiny_vae import save_vae
from unet import REFINER, SCALE, XL, drawn_by_both, drawn_by_reference, drawn_by_unet_pipeline, save_controlled, save_unet

import dq_export
from dq_export.core.network import Feed
from dq_export.core.recipe import Recipe
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.pipeline import run
from dq_export.stages.triton import require_served

SEED = 3
QUICK: dict[str, Any] = {
    **{"format": "ort", "bits": "w8a8", "scaling": "none", "guidance_scale": 2.0},
    **{"steps": 4, "parity_size": 1, "calib_size": 2},
}
DOWN, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_controlled(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_controlled(tmp_path_factory.mktemp("xl"), **XL)


def feeds_of(reference: Any) -> tuple[list[Feed], Any]:
    """What the network reads in each call, and two pictures that are drawn."""
    return drawn_by_reference(reference, reference.noise(2, SEED), np.arange(2))


@pytest.mark.parametrize("name", ["plain", "xl"])
def test_calibration_sends_the_residuals_of_outlines(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    reference = encoded(folder)
    reference.draw_at(128, 96)
    feeds, latents = feeds_of(reference)
    exact = drawn_by_unet_pipeline(folder, reference, np.arange(2), 2.0, SEED)
    assert np.abs(latents - exact).max() <= 1e-5 * np.abs(exact).max()
    shapes = {key: rows.shape for key, rows in feeds[0].items() if "residual" in key}
    assert shapes == {
        f"{DOWN}_0": (4, 32, 16, 12),
        f"{DOWN}_1": (4, 32, 16, 12),
        f"{DOWN}_2": (4, 32, 8, 6),
        f"{DOWN}_3": (4, 64, 8, 6),
        MIDDLE: (4, 64, 8, 6),
    }
    sizes = [[np.abs(rows).mean() for key, rows in feed.items() if "residual" in key] for feed in feeds]
    assert np.ptp(sizes, axis=0).min() > 0, "others in each call"
    assert "ControlNet" in reference.sampler
    assert [float(feed["timestep"][0]) for feed in feeds] == reference.timesteps(4)


def test_without_residuals_it_is_the_plain_network(plain: Path, tmp_path: Path) -> None:
    reference, other = encoded(plain), encoded(save_unet(tmp_path))
    feed = feeds_of(reference)[0][0]
    silent = {key: np.zeros_like(rows) if "residual" in key else rows for key, rows in feed.items()}
    expected = other.forward({key: rows for key, rows in feed.items() if "residual" not in key})
    np.testing.assert_array_equal(reference.forward(silent), expected)
    assert np.abs(reference.forward(feed) - expected).max() > 0.05 * np.abs(expected).max()
    assert other.digest != reference.digest


def test_a_latent_consistency_model_takes_residuals_too(tmp_path: Path) -> None:
    folder = save_controlled(tmp_path, time_cond_proj_dim=SCALE)
    reference = encoded(folder)
    feeds, latents = feeds_of(reference)
    exact = drawn_by_unet_pipeline(folder, reference, np.arange(2), 2.0, SEED)
    assert np.abs(latents - exact).max() <= 1e-5 * np.abs(exact).max()
    assert feeds[0][MIDDLE].shape == (2, 64, 4, 4), "one call a step for both pictures"


def exported(model: Path, out: Path, **values: Any) -> Any:
    """The engine of an export, after two pictures in diffusers' pipeline like PyTorch's."""
    vae = save_vae(model.parent / "vae", latent_channels=4, block_out_channels=(8,) * 4, sample_size=64)
    report = run(Recipe.parse({"model": str(model), **QUICK, **values}, "test"), out, until="verify")
    assert report is not None
    assert report.audit is not None
    assert report.parity is not None
    assert report.audit.coverage == 1
    assert min(call.sqnr for call in report.parity.calls if call.stage == "engine") > 30
    stand_in = dq_export.load(out)
    edges = torch.from_numpy(np.kron(np.eye(8), np.ones((3, 8, 8)))[None].astype(np.float32))
    for scale in (1.0, 0.5):
        arguments = {"image": edges, "controlnet_conditioning_scale": scale, "guidance_scale": 2.0, "num_inference_steps": 5}
        exact, actual = drawn_by_both(model, vae, stand_in, **arguments)
        assert exact.shape == (1, 3, 64, 64)
        assert 0 < (actual - exact).abs().max() < 0.1 * exact.std()
    return stand_in


def test_the_engine_stands_in_for_pipe_unet_beside_a_controlnet(plain: Path, tmp_path: Path) -> None:
    """With a control picture, prompts and a VAE, as a user calls it; wrong residuals end before the engine runs."""
    model = Path(shutil.copytree(plain, tmp_path / "model"))
    stand_in = exported(model, tmp_path / "out")
    zeros = {item.name: torch.from_numpy(item.zeros(2)) for item in stand_in.inputs}
    residuals = [rows for name, rows in zeros.items() if name.startswith(DOWN)]

    def called(down: list[torch.Tensor], **others: Any) -> Any:
        first = (zeros["sample"], 5, zeros["encoder_hidden_states"])
        return stand_in(*first, down_block_additional_residuals=down, **{MIDDLE: zeros[MIDDLE], **others}).sample

    assert called(residuals).shape == (2, 4, 8, 8)
    with pytest.raises(TypeError, match=rf"misses {DOWN}_3 \(it takes {DOWN}_0, "):
        called(residuals[:3])
    with pytest.raises(TypeError, match=f"does not take {DOWN}_4 "):
        called([*residuals, residuals[3]])
    with pytest.raises(TypeError, match=f"misses {MIDDLE} "):
        called(residuals, **{MIDDLE: None})
    with pytest.raises(ValueError, match=rf"{DOWN}_2 has shape \[2, 32, 8, 8\], and the network takes \[2, 32, 4, 4\]"):
        called([*residuals[:2], residuals[0], residuals[3]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"model": XL},
        {"provider": "openvino"},
        {"timesteps": "per-sample"},
        {"sizes": "64x64,96x128"},
        {"rounding": "distill", "distill_iterations": 4, "distill_pictures": 1, "distill_samples": 8},
    ],
    ids=["xl", "openvino", "per-sample", "sizes", "distill"],
)
def test_engines_of_other_recipes_stand_in_too(values: dict[str, Any], tmp_path: Path) -> None:
    """OpenVINO on a network of three levels: it computes attention wrongly where a level's size is that of a residual."""
    changes = values.get("model", {})
    if "provider" in values:
        kinds = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
        changes = {"block_out_channels": (32, 64, 64), "down_block_types": kinds, "layers_per_block": 2}
        changes["up_block_types"] = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
    model = save_controlled(tmp_path / "model", **changes)
    exported(model, tmp_path / "out", **{key: value for key, value in values.items() if key != "model"})


def without_folder(folder: Path) -> None:
    shutil.rmtree(folder / "controlnet")


def several(folder: Path) -> None:
    edit(folder / "model_index.json", controlnet=["diffusers.pipelines.controlnet", "MultiControlNetModel"])


def of_another_class(folder: Path) -> None:
    edit(folder / "controlnet" / "config.json", _class_name="ControlNetUnionModel")


def of_another_network(folder: Path) -> None:
    edit(folder / "controlnet" / "config.json", cross_attention_dim=48)


def pooling(folder: Path) -> None:
    edit(folder / "controlnet" / "config.json", global_pool_conditions=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_folder, r"model_index.json: names a controlnet, and there is no controlnet/config.json; copy or download it"),
        (several, r"controlnet is \['diffusers\S* 'MultiControlNetModel'\]; expected \['diffusers', 'ControlNetModel'\]"),
        (of_another_class, r"config.json: _class_name is 'ControlNetUnionModel'; expected ControlNetModel"),
        (of_another_network, r"controlnet/config.json: cross_attention_dim 48; expected 32, as in the network's config.json"),
        (pooling, "global_pool_conditions = True: expected False"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused(
    spoil: Callable[[Path], None], message: str, plain: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_reference(str(folder))


def test_a_controlnet_of_the_refiner_is_refused(tmp_path: Path) -> None:
    changes = {name: value for name, value in REFINER.items() if name != "task"}
    with pytest.raises(ModelError, match="a ControlNet of XL's refiner, with which no pipeline draws"):
        load_reference(str(save_controlled(tmp_path, **changes)))


def test_a_server_is_refused(plain: Path) -> None:
    reference: Any = load_reference(str(plain))
    with pytest.raises(ModelError, match="--triton: the server runs no ControlNet, and this network takes the residuals of one"):
        require_served(recipe_of(reference), reference)
