"""A whole export of a tiny FLUX.2 klein in bfloat16; diffusers' own pipeline draws prompts with the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sqnr
from flux2 import SIDE, flux2_pipeline, save_flux2
from toy import PROMPTS

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.core.tensor_file import load_tensors
from dq_export.families.source import load_reference
from dq_export.finished_folder import FinishedFolder
from dq_export.pipeline import run
from dq_export.report.report import Report
from dq_export.stages.recording import HELD_OUT

pytestmark = pytest.mark.slow
STEPS, PICTURES = 4, 2
SETTINGS: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux2(tmp_path_factory.mktemp("flux2"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    exported(model, folder, "bench")
    return folder


def exported(model: Path, out: Path, until: str, **options: Any) -> Report:
    values = {"sizes": "x".join(map(str, SIDE)), "steps": STEPS, "parity_size": PICTURES, "calib_size": 2, "bins": "per-step"}
    report = run(Recipe.parse({"model": str(model), "min_sqnr": 10, **values, **options}, "test"), out, until=until)
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert len([gemm for gemm in report.audit.gemms if gemm.required]) == 2 * 12 + 2 * 2
    return report


def test_the_engine_draws_in_diffusers_pipeline_what_the_export_recorded(model: Path, out: Path) -> None:
    """The pipeline encodes the prompts itself; the export's report says how far its engine's pictures are from PyTorch's."""
    report = FinishedFolder.open(out).report()
    assert report.worst_call("float-onnx").sqnr > 100
    assert report.worst_call("engine").sqnr > 15
    reference = load_reference(str(model))
    reference.draw_at(*SIDE)
    noise = torch.from_numpy(reference.noise(PICTURES, HELD_OUT)).transpose(1, 2).unflatten(2, (SIDE[0] // 16, SIDE[1] // 16))
    pipeline = flux2_pipeline(model, dq_export.load(out))
    pipeline.text_encoder.float()  # as an export computes it
    latents = pipeline(prompt=list(PROMPTS[:PICTURES]), height=SIDE[0], width=SIDE[1], latents=noise, **SETTINGS).images
    actual = pipeline._pack_latents(pipeline._patchify_latents(latents))
    recorded = load_tensors(out / "parity" / "pytorch.safetensors")[0]["pictures"]
    assert report.parity is not None
    assert sqnr(recorded, actual.numpy()) == pytest.approx(report.parity.trajectories[0].sqnr, abs=1e-2)


def test_the_guidance_of_a_model_that_is_not_distilled_and_another_size_need_no_other_engine(model: Path, out: Path) -> None:
    latents = []
    for transformer in (None, dq_export.load(out)):
        pipeline = flux2_pipeline(model, transformer)
        pipeline.register_to_config(is_distilled=False)
        pipeline.text_encoder.float()
        pipeline.transformer = pipeline.transformer if transformer else pipeline.transformer.float()
        options = {"height": 96, "width": 80, "guidance_scale": 3.0, **SETTINGS}
        latents.append(pipeline(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(1), **options).images.numpy())
    assert latents[1].shape == (1, 2, 12, 10)
    assert np.isfinite(latents[1]).all()
    assert sqnr(*latents) > 10


@pytest.mark.parametrize("options", [{"timesteps": "per-sample"}, {"provider": "openvino"}])
def test_other_forms(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    assert exported(model, tmp_path / "out", "bench", **options).worst_call("engine").sqnr > 12


def test_a_plan_is_built_ahead_of_time(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = exported(model, tmp_path / "out", "audit", format="trt-rtx", target="sm89", dtype="fp16")
    assert report.audit is not None
    assert {gemm.kernel for gemm in report.audit.gemms if gemm.required} == {"gemm Int8xInt8"}
