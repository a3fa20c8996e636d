"""Whole exports of a tiny Stable Diffusion 3.5; diffusers' own pipelines draw prompts with the engine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import sqnr
from safetensors.torch import load_file, save_file
from sd3 import save_sd3, sd3_pipeline
from toy import PROMPTS

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.core.tensor_file import load_tensors
from dq_export.deploy.replay import load_replay
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.finished_folder import FinishedFolder
from dq_export.pipeline import run
from dq_export.report.report import Report
from dq_export.stages.recording import HELD_OUT

STEPS, PICTURES, GUIDANCE = 4, 2, 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    exported(model, folder)
    return folder


def exported(model: Path, out: Path, **options: Any) -> Report:
    values = {"steps": STEPS, "parity_size": PICTURES, "guidance_scale": GUIDANCE, "calib_size": 2, "bins": "per-step"}
    report = run(Recipe.parse({"model": str(model), **values, **options}, "test"), out, until="verify")
    assert report is not None
    return report


def test_every_linear_of_the_blocks_runs_on_integers(out: Path) -> None:
    report = FinishedFolder.open(out).report()
    assert report.audit is not None
    assert report.audit.coverage == 1
    required = [gemm.name for gemm in report.audit.gemms if gemm.required]
    assert len(required) == 16 + 12 + 9, "of the block with dual attention, the plain one, and the last one"
    assert report.worst_call("float-onnx").sqnr > 110
    assert report.worst_call("engine").sqnr > 20


def test_scales_go_by_fractional_timesteps(out: Path, model: Path) -> None:
    """Four steps of a shifted flow, a bin for each."""
    report = FinishedFolder.open(out).report()
    assert report.parity is not None
    timesteps = load_reference(str(model)).timesteps(STEPS)
    assert sorted({call.timestep for call in report.parity.calls}) == sorted(timesteps)
    assert {call.bin for call in report.parity.calls} == {0, 1, 2, 3}
    assert not all(timestep == int(timestep) for timestep in timesteps)
    feeds, _ = load_replay(out / "parity")
    assert {feed["timestep"].dtype for feed in feeds} == {np.dtype(np.float32)}


def test_the_engine_draws_in_diffusers_pipeline_what_the_export_recorded(model: Path, out: Path) -> None:
    """The pipeline encodes the prompts itself; the export's report says how far its engine's pictures are from PyTorch's."""
    actual = sd3_pipeline(model, dq_export.load(out))(
        list(PROMPTS[:PICTURES]), num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=64, width=64,
        latents=torch.from_numpy(load_reference(str(model)).noise(PICTURES, HELD_OUT)), output_type="latent",
    ).images  # fmt: skip
    parity = FinishedFolder.open(out).report().parity
    assert parity is not None
    recorded = load_tensors(out / "parity" / "pytorch.safetensors")[0]["pictures"]
    assert sqnr(recorded, actual.numpy()) == pytest.approx(parity.trajectories[0].sqnr, abs=1e-3)


def test_a_picture_of_another_size_starts_from_a_picture(model: Path, out: Path) -> None:
    """Image to image, with the same engine."""
    source = sd3_pipeline(model)
    parts = {name: part for name, part in source.components.items() if name not in ("vae", "transformer", "image_encoder")}
    parts.pop("feature_extractor")
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)  # a latent is a pixel
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**parts, vae=vae, transformer=dq_export.load(out))
    pipeline.set_progress_bar_config(disable=True)
    start = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 4, 12, 10)).astype(np.float32))
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "strength": 0.75, "output_type": "latent"}
    latents = []
    for transformer in (pipeline.transformer, source.transformer):
        pipeline.transformer = transformer
        generator = torch.Generator().manual_seed(1)
        latents.append(pipeline(PROMPTS[0], image=start, generator=generator, height=12, width=10, **options).images.numpy())
    assert latents[0].shape == (1, 4, 12, 10)
    assert sqnr(latents[1], latents[0]) > 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"hidden_states": torch.zeros(1, 4, 20, 8)},
            "hidden_states has shape [1, 4, 20, 8], and the network takes [batch",
        ),
        ({"hidden_states": torch.zeros(1, 4, 7, 8)}, "hidden_states has shape [1, 4, 7, 8], and the network takes [batch"),
        (
            {"encoder_hidden_states": torch.zeros(1, 5, 9)},
            "encoder_hidden_states has shape [1, 5, 9], and the network takes [1",
        ),
    ],
)
def test_values_that_the_network_does_not_take_are_refused_before_it_computes(
    call: dict[str, Any], message: str, out: Path
) -> None:
    values = {
        "hidden_states": torch.zeros(1, 4, 8, 8), "timestep": torch.ones(1), "encoder_hidden_states": torch.zeros(1, 5, 8),
        "pooled_projections": torch.zeros(1, 8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dq_export.load(out)(**{**values, **call})


def test_a_network_that_is_not_trained_is_refused(model: Path, tmp_path: Path) -> None:
    """One whose gates are zeros, as adaLN-Zero begins."""
    from safetensors.torch import load_file, save_file

    fresh = Path(shutil.copytree(model, tmp_path / "fresh"))
    path = fresh / "transformer" / "diffusion_pytorch_model.safetensors"
    zeros = [f"transformer_blocks.{block}.norm1.linear.{part}" for block in (0, 2) for part in ("weight", "bias")]
    save_file({name: value * (name not in zeros) for name, value in load_file(path).items()}, path)
    message = r"^'transformer_blocks\.0\.norm1\.linear' and 1 more of 6: weights and bias are zero throughout, .* trained check"
    with pytest.raises(ModelError, match=message):
        run(Recipe.parse({"model": str(fresh)}, "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "takes"), [("80x64", True), ("72x64", False), ("84x64", False), ("160x64", False)])
def test_a_size_is_drawn_or_refused_before_any_work(size: str, takes: bool, model: Path, tmp_path: Path) -> None:
    """Latents of 8 pixels, patches of two of them, and at most 9 patches along an axis."""
    reference = load_reference(str(model))
    if takes:
        reference.draw_at(*map(int, size.split("x")))
        assert reference.feed_shape == (4, 10, 8)
        assert len(reference.timesteps(STEPS)) == STEPS
        return
    with pytest.raises(ModelError, match=rf"^size {size}: expected HEIGHTxWIDTH in steps of 8 .*height up to 18 in steps"):
        run(Recipe.parse({"model": str(model), "sizes": size}, "test"), tmp_path / "out")


def test_layers_that_a_pipeline_would_skip_are_refused(model: Path, out: Path) -> None:
    with pytest.raises(TypeError, match="this SD3Transformer2DModel does not take skip_layers"):
        sd3_pipeline(model, dq_export.load(out))(
            PROMPTS[0], num_inference_steps=5, height=64, width=64, output_type="latent", skip_guidance_layers=[0],
            skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("until", ["load", pytest.param("quantize", marks=pytest.mark.slow)])
def test_half_precision_gives_what_its_values_in_float32_give(until: str, tmp_path: Path) -> None:
    half = save_sd3(tmp_path / "half", dtype=torch.bfloat16)
    whole = Path(shutil.copytree(half, tmp_path / "whole"))
    diffusers.SD3Transformer2DModel.from_pretrained(whole / "transformer").float().save_pretrained(whole / "transformer")
    assert load_reference(str(half)).digest == load_reference(str(whole)).digest
    if until == "load":
        return
    values = {"steps": STEPS, "calib_size": 2, "rounding": "gptq"}
    for model in (half, whole):
        run(Recipe.parse({"model": str(model), **values}, "test"), model / "out", until=until)
        assert [path.name for path in (model / "out").glob(".*")] == [".lock"]
    actual, exact = (load_tensors(model / "out" / "calibration.safetensors")[0] for model in (half, whole))
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        np.testing.assert_array_equal(actual[name], value)


def test_a_checkpoint_of_two_kinds_is_not_kept_mapped(tmp_path: Path) -> None:
    """As diffusers writes networks of which some modules must stay float32."""
    folder = save_sd3(tmp_path / "model", dtype=torch.bfloat16)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = {name: value.clone() for name, value in load_file(file).items()}  # not mapped
    save_file({**tensors, "pos_embed.pos_embed": tensors["pos_embed.pos_embed"].float()}, file, metadata={"format": "pt"})
    reference: Any = load_reference(str(folder))
    assert str(file) not in Path("/proc/self/maps").read_text()
    for name, value in reference.model.state_dict().items():
        assert torch.equal(value, tensors[name].float())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"timesteps": "per-sample"},
        {"granularity": "token"},
        {"provider": "openvino"},
    ],
)
def test_other_forms(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    report = exported(model, tmp_path / "out", **options)
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert report.worst_call("engine").sqnr > 12


@pytest.mark.slow
def test_a_plan_is_built_ahead_of_time(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    values = {"model": str(model), "steps": STEPS, "calib_size": 2, "format": "trt-rtx", "target": "sm89", "dtype": "fp16"}
    report = run(Recipe.parse(values, "test"), tmp_path / "out", until="audit")
    assert report is not None
    assert report.audit is not None
    assert {gemm.kernel for gemm in report.audit.gemms if gemm.required} == {"gemm Int8xInt8"}
