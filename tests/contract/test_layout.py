"""`--layout diffusers`: the folder that optimum's ORTDiffusionPipeline loads, by its rules and by the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from conftest import sqnr
from sd3 import CLIP, save_sd3, sd3_pipeline
from small_graphs import Builder
from toy import PROMPTS, WIDTH
from unet import save_unet, unet_pipeline

import dq_export
from dq_export.core.condition_file import CONDITIONS, save_conditions
from dq_export.core.network import Conditions, Float32
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.families.pipeline_folder import write_pipeline
from dq_export.families.reference import ModelError
from dq_export.families.source import locate
from dq_export.pipeline import run

STEPS, GUIDANCE, SIDE, PICTURES = 4, 2.0, 8, 2
NOISE = np.random.default_rng(0).normal(size=(PICTURES, 4, SIDE, SIDE)).astype(np.float32)
LATENTS = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
ROWS = {"encoder_hidden_states": np.zeros((1, 77, WIDTH), np.float32), "pooled_projections": np.zeros((1, 2 * CLIP), np.float32)}
CONDITION = Conditions(names=("one",), arrays=ROWS, null=ROWS)
OPTIMUM = "DQ_EXPORT_OPTIMUM"
"""The variable that names a Python with optimum-onnx, which takes older versions of diffusers and transformers."""
DRAW = """
import sys
import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline

folder, noise, drawn, side, *prompts = sys.argv[1:]
pipe = ORTDiffusionPipeline.from_pretrained(folder)
images = pipe(
    prompts, num_inference_steps=4, guidance_scale=2.0, height=int(side), width=int(side),
    latents=torch.from_numpy(np.load(noise)), output_type="np", return_dict=False,
)[0]
np.save(drawn, images)
"""


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without T5."""
    return with_vae(save_sd3(tmp_path_factory.mktemp("sd3"), t5=False))


def with_vae(folder: Path) -> Path:
    """The same pipeline with a VAE that halves pictures, and the files that older tokenizers read."""
    torch.manual_seed(1)
    diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4, shift_factor=0.1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    for place in folder.glob("tokenizer*"):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(place)
        (place / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
        (place / "merges.txt").write_text("#version: 0.2\n")
    return folder


def exported(model: Path, out: Path) -> Path:
    values = {"model": str(model), "steps": STEPS, "calib_size": 2, "parity_size": 1, "guidance_scale": GUIDANCE}
    run(Recipe.parse({**values, "layout": "diffusers"}, "test"), out, until="layout")
    return out


def outputs(path: Path, **feed: Any) -> dict[str, Float32]:
    """A graph's outputs by name."""
    session = ort.InferenceSession(path)
    assert (path.parent / "config.json").is_file(), "optimum takes no graph without"
    return dict(zip((item.name for item in session.get_outputs()), session.run(None, feed), strict=True))


def linear(path: Path) -> None:
    """A graph with a weight beside it."""
    b = Builder(hidden_states=(ir.DataType.FLOAT, ["batch", 64]))
    product = b.node("MatMul", b.value["hidden_states"], b.weight("weight", 64, 64), shape=["batch", 64])
    product.name = "sample"
    ir.save(b.model(product), path, external_data=f"{path.name}.data", size_threshold_bytes=0)


def test_what_a_checkpoint_does_not_have_is_null_in_the_index(tmp_path: Path) -> None:
    model = save_sd3(tmp_path / "model", t5=False)
    for place in [*model.glob("text_encoder*"), *model.glob("tokenizer*"), model / "scheduler"]:
        shutil.rmtree(place)
    source, config = locate(str(model)), json.loads((model / "transformer" / "config.json").read_text())
    linear(tmp_path / "model.onnx")
    folder = tmp_path / "diffusers"
    missing = write_pipeline(source.family, source.checkpoint, config, tmp_path / "model.onnx", folder)
    assert missing == ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae")
    index = json.loads((folder / "model_index.json").read_text())
    assert index == {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        **{f"{part}{number}": [None, None] for part in ("tokenizer", "text_encoder") for number in ("", "_2", "_3")},
    }
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 3.0)
    feed = {"hidden_states": np.ones((2, 64), dtype=np.float32)}
    actual, exact = (
        ort.InferenceSession(path).run(None, feed)[0] for path in (folder / "transformer" / "model.onnx", tmp_path / "model.onnx")
    )
    np.testing.assert_array_equal(actual, exact)
    assert list(outputs(folder / "transformer" / "model.onnx", **feed)) == ["out_hidden_states"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"format": "trt"},
            RecipeError,
            "--layout diffusers: optimum runs graphs of --format ort and onnx, and this is --format trt",
        ),
        ({"timesteps": "shared"}, RecipeError, "--layout diffusers: optimum sends per-sample timesteps to this network; leave"),
        ({"index": None}, ModelError, "--layout diffusers: .*model_index.json: no such file; pass the whole pipeline's folder"),
        ({"index": "PixArtSigmaPipeline"}, ModelError, "'PixArtSigmaPipeline', and the folder is for StableDiffusionPipeline"),
        ({"broken": "vae"}, ModelError, "vae: no weights"),
        ({"broken": "text_encoder"}, ModelError, "text_encoder: no weights"),
    ],
)
def test_what_optimum_cannot_load_is_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str, sd3: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(sd3, tmp_path / "model"))
    if "index" in options:
        (model / "model_index.json").unlink()
    if options.get("index"):
        (model / "model_index.json").write_text(json.dumps({"_class_name": options["index"]}))
    if "broken" in options:
        next((model / options["broken"]).glob("*.safetensors")).unlink()
    values = {key: value for key, value in options.items() if key in Recipe.model_fields}
    if "index" in options or "broken" in options:
        save_conditions(tmp_path / CONDITIONS, CONDITION)
        values["conditions"] = str(tmp_path / CONDITIONS)
    with pytest.raises(error, match=message):
        run(Recipe.parse({"model": str(model), "layout": "diffusers", **values}, "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def drawn_by_diffusers(pipeline_class: Any, vae: Any) -> Float32:
    """The pictures of the first prompts, by diffusers' pipeline with the engine and the VAE."""
    pipeline_class.register_modules(vae=vae)
    pipeline_class.vae_scale_factor = 2
    latents: Float32 = pipeline_class(
        list(PROMPTS[:PICTURES]), num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=2 * SIDE, width=2 * SIDE,
        latents=torch.from_numpy(NOISE), output_type="np",
    ).images  # fmt: skip
    return latents


def drawn_by_optimum(out: Path, folder: Path) -> Float32:
    """The same pictures, by optimum's pipeline."""
    np.save(folder / "noise.npy", NOISE)
    command = [os.environ[OPTIMUM], "-c", DRAW, str(out / "diffusers"), str(folder / "noise.npy"), str(folder / "drawn.npy")]
    result = subprocess.run([*command, str(2 * SIDE), *PROMPTS[:PICTURES]], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    latents: Float32 = np.load(folder / "drawn.npy")
    return latents


@pytest.mark.slow
def test_a_folder_with_all_parts_gives_what_diffusers_gives(sd3: Path, tmp_path: Path) -> None:
    """Its encoders and its VAE against diffusers' own; its pictures, drawn by optimum where there is one, against `load`'s."""
    out = exported(sd3, tmp_path / "out")
    folder = out / "diffusers"
    pipeline = sd3_pipeline(sd3)
    tokens = torch.randint(0, 10, (3, 77), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = pipeline.text_encoder_2(tokens, output_hidden_states=True)
        vae = diffusers.AutoencoderKL.from_pretrained(sd3 / "vae").eval()
        picture = vae.decode(LATENTS).sample
        moments = vae.encode(picture).latent_dist.parameters
    actual = outputs(folder / "text_encoder_2" / "model.onnx", input_ids=tokens.numpy())
    assert list(actual) == ["text_embeds", "last_hidden_state", "hidden_states.0", "hidden_states.1"]
    np.testing.assert_allclose(actual["text_embeds"], states.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(actual["hidden_states.1"], states.hidden_states[-2].numpy(), atol=1e-5)
    decoded = outputs(folder / "vae_decoder" / "model.onnx", latent_sample=LATENTS.numpy())["sample"]
    np.testing.assert_allclose(decoded, picture.numpy(), atol=1e-5)
    encoded = outputs(folder / "vae_encoder" / "model.onnx", sample=decoded)["latent_parameters"]
    np.testing.assert_allclose(encoded, moments.numpy(), atol=1e-5)
    if OPTIMUM in os.environ:
        pipeline.transformer = dq_export.load(out)
        assert sqnr(drawn_by_diffusers(pipeline, vae), drawn_by_optimum(out, tmp_path)) > 60


@pytest.mark.slow
def test_a_unet_gets_one_timestep(tmp_path: Path) -> None:
    model = with_vae(save_unet(tmp_path / "model"))
    out = exported(model, tmp_path / "out")
    session = ort.InferenceSession(out / "diffusers" / "unet" / "model.onnx")
    assert {item.name: item.shape for item in session.get_inputs()}["timestep"] == [1]
    assert [item.name for item in session.get_outputs()] == ["out_sample"]
    if OPTIMUM in os.environ:
        vae = diffusers.AutoencoderKL.from_pretrained(model / "vae").eval()
        exact = drawn_by_diffusers(unet_pipeline(model, dq_export.load(out)), vae)
        assert sqnr(exact, drawn_by_optimum(out, tmp_path)) > 60
