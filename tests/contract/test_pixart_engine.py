"""PixArt's own pipeline draws prompts with the engine of an export, and another model's pipeline is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import sqnr
from pixart import save_pixart
from toy import PROMPTS
from transformers import T5EncoderModel, T5Tokenizer

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.core.tensor_file import load_tensors
from dq_export.families.source import load_reference
from dq_export.finished_folder import FinishedFolder
from dq_export.pipeline import run
from dq_export.stages.recording import HELD_OUT

pytestmark = pytest.mark.slow  # the packaged model shows the same in the suite, with an export of its own
STEPS, PICTURES, GUIDANCE = 4, 2, 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pixart(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    values = {"steps": STEPS, "parity_size": PICTURES, "guidance_scale": GUIDANCE, "calib_size": 2, "scaling": "none"}
    run(Recipe.parse({"model": str(model), **values}, "test"), folder, until="verify")
    return folder


def test_a_prompt_goes_in_and_the_engine_draws_what_the_export_recorded(model: Path, out: Path) -> None:
    """The pipeline encodes the prompts itself; the export's report says how far its engine's pictures are from PyTorch's."""
    pipeline = diffusers.PixArtSigmaPipeline(
        tokenizer=T5Tokenizer.from_pretrained(model / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(model / "text_encoder").eval(),
        vae=None,
        transformer=dq_export.load(out),
        scheduler=diffusers.DPMSolverMultistepScheduler.from_pretrained(model / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    actual = pipeline(
        list(PROMPTS[:PICTURES]),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(load_reference(str(model)).noise(PICTURES, HELD_OUT)),
        output_type="latent",
        clean_caption=False,
        use_resolution_binning=False,
    ).images
    parity = FinishedFolder.open(out).report().parity
    assert parity is not None
    recorded = load_tensors(out / "parity" / "pytorch.safetensors")[0]["pictures"]
    assert sqnr(recorded, actual.numpy()) == pytest.approx(parity.trajectories[0].sqnr, abs=1e-3)


def test_a_pipeline_of_another_model_is_refused_before_it_samples(model: Path, out: Path) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    scheduler = diffusers.DDIMScheduler.from_pretrained(model / "scheduler")
    pipeline = diffusers.DiTPipeline(transformer=dq_export.load(out), vae=vae, scheduler=scheduler)
    with pytest.raises(TypeError) as error:
        pipeline([1], num_inference_steps=STEPS)
    assert str(error.value) == (
        "PixArtTransformer2DModel: got an unexpected keyword argument 'class_labels'; use a pipeline that is for this network"
    )


def test_the_documents_lines_of_plain_onnxruntime_draw_a_prompt(
    model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size of this model's latents."""
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "conditions.safetensors" in block]
    assert "128, 128" in code
    (tmp_path / "out").symlink_to(out)
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    actual: dict[str, Any] = {}
    exec(code.replace("128, 128", "8, 8"), actual)  # the page's own lines
    assert actual["latents"].shape == (1, 4, 8, 8)
    assert np.isfinite(actual["latents"].numpy()).all()
