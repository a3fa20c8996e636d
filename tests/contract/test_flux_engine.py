"""Whole exports of a tiny FLUX; diffusers' own pipelines draw prompts with the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import sqnr
from flux import SIDE, flux_pipeline, save_flux
from toy import PROMPTS

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.core.tensor_file import load_tensors
from dq_export.deploy.replay import load_replay
from dq_export.families.source import load_reference
from dq_export.finished_folder import FinishedFolder
from dq_export.pipeline import run
from dq_export.report.report import Report
from dq_export.stages.recording import HELD_OUT

STEPS, PICTURES, GUIDANCE = 4, 2, 3.0
SIZE = "x".join(map(str, SIDE))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    exported(model, folder, "bench")
    return folder


def exported(model: Path, out: Path, until: str, **options: Any) -> Report:
    values = {"steps": STEPS, "parity_size": PICTURES, "guidance_scale": GUIDANCE, "calib_size": 2, "bins": "per-step"}
    recipe = {"model": str(model), "sizes": SIZE, "min_sqnr": 10, **values, **options}
    report = run(Recipe.parse(recipe, "test"), out, until=until)
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert len([gemm for gemm in report.audit.gemms if gemm.required]) == 2 * 12 + 2 * 5
    return report


def test_scales_go_by_timesteps_between_0_and_1(out: Path, model: Path) -> None:
    """One for each step of a flow that is shifted by the picture's size."""
    report = FinishedFolder.open(out).report()
    assert report.parity is not None
    reference = load_reference(str(model))
    reference.draw_at(*SIDE)
    assert sorted({call.timestep for call in report.parity.calls}) == sorted(reference.timesteps(STEPS))
    assert {call.bin for call in report.parity.calls} == {0, 1, 2, 3}
    assert report.worst_call("float-onnx").sqnr > 110
    assert report.worst_call("engine").sqnr > 15
    feeds, _ = load_replay(out / "parity")
    assert [feeds[0][name].shape for name in ("hidden_states", "img_ids", "txt_ids", "guidance")] == [
        (2, 24, 8), (24, 3), (512, 3), (2,)
    ]  # fmt: skip


def test_the_engine_draws_in_diffusers_pipeline_what_the_export_recorded(model: Path, out: Path) -> None:
    """The pipeline encodes the prompts itself; the export's report says how far its engine's pictures are from PyTorch's."""
    reference = load_reference(str(model))
    reference.draw_at(*SIDE)
    actual = flux_pipeline(model, dq_export.load(out))(
        list(PROMPTS[:PICTURES]), num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIDE[0], width=SIDE[1],
        latents=torch.from_numpy(reference.noise(PICTURES, HELD_OUT)), output_type="latent",
    ).images  # fmt: skip
    parity = FinishedFolder.open(out).report().parity
    assert parity is not None
    recorded = load_tensors(out / "parity" / "pytorch.safetensors")[0]["pictures"]
    assert sqnr(recorded, actual.numpy()) == pytest.approx(parity.trajectories[0].sqnr, abs=1e-3)


def test_real_guidance_and_another_size_need_no_other_engine(model: Path, out: Path) -> None:
    options = {"num_inference_steps": STEPS, "height": 96, "width": 80, "output_type": "latent"}
    guided = {"true_cfg_scale": 2.0, "negative_prompt": PROMPTS[1], "guidance_scale": GUIDANCE}
    pictures = [
        flux_pipeline(model, transformer)(PROMPTS[0], generator=torch.Generator().manual_seed(1), **options, **guided).images
        for transformer in (None, dq_export.load(out))
    ]
    assert pictures[1].shape == (1, 6 * 5, 8)
    assert sqnr(*(latents.numpy() for latents in pictures)) > 12


def test_a_picture_starts_from_a_picture(model: Path, out: Path) -> None:
    vae = diffusers.AutoencoderKL(latent_channels=2, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0)
    start, latents = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(2)), []
    for transformer in (None, dq_export.load(out)):
        pipeline = flux_pipeline(model, transformer, "FluxImg2ImgPipeline", vae)
        options = {"num_inference_steps": STEPS, "strength": 0.75, "output_type": "latent", "height": 8, "width": 12}
        latents.append(pipeline(PROMPTS[0], image=start, generator=torch.Generator().manual_seed(1), **options).images.numpy())
    assert sqnr(*latents) > 12


def test_a_guidance_that_the_network_does_not_take_is_refused(model: Path, out: Path) -> None:
    """schnell's pipeline would leave it out of dev's calls."""
    engine = dq_export.load(out)
    call = {
        "hidden_states": np.zeros((1, 24, 8)), "timestep": np.ones(1), "encoder_hidden_states": np.zeros((1, 512, 8)),
        "pooled_projections": np.zeros((1, 4)), "img_ids": np.zeros((24, 3)), "txt_ids": np.zeros((512, 3)),
    }  # fmt: skip
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in call.items()}
    with pytest.raises(TypeError, match="this FluxTransformer2DModel misses guidance"):
        engine(**tensors)
    with pytest.raises(ValueError, match=r"img_ids has shape \[25, 3\], and the network takes \[24, 3\]"):
        engine(**{**tensors, "img_ids": torch.zeros(25, 3)}, guidance=torch.ones(1))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"timesteps": "per-sample"}, {"granularity": "token"}, {"provider": "openvino"}])
def test_other_forms(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    assert exported(model, tmp_path / "out", "bench", **options).worst_call("engine").sqnr > 12


@pytest.mark.slow
def test_a_plan_is_built_ahead_of_time(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = exported(model, tmp_path / "out", "audit", format="trt-rtx", target="sm89", dtype="fp16")
    assert report.audit is not None
    assert {gemm.kernel for gemm in report.audit.gemms if gemm.required} == {"gemm Int8xInt8"}
    shapes = json.loads((tmp_path / "out" / "engine" / "plan.json").read_text())["profiles"]
    assert shapes["hidden_states"] == [[batch, 24, 8] for batch in (1, 2, 16)]
    assert shapes["img_ids"] == [[24, 3]] * 3
