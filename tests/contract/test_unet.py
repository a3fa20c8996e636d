"""What is the UNets' own: XL's further inputs, sizes that their levels halve, velocities, and the values that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from json_file import edit
from toy import PROMPTS
from unet import CLIP, SCALE, TINY, XL, drawn_by_unet_pipeline, save_lcm, save_unet

import dq_export
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.scheme import scheme_of
from dq_export.families.config_values import require_values
from dq_export.families.reference import ModelError
from dq_export.families.source import MODELS, load_reference
from dq_export.families.unet import UNET
from dq_export.families.unet_values import UNetValues
from dq_export.pipeline import run

SEED = 3
CONVOLUTIONS = 31
"""Of a tiny network's blocks."""
SD15 = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
"""Stable Diffusion 1.5's config.json."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet(tmp_path_factory.mktemp("xl"), **XL)


def encoded(folder: Path) -> Any:
    reference: Any = load_reference(str(folder))
    reference.conditions = reference.encode(PROMPTS, "cpu")
    return reference


def test_xl_takes_the_pooled_text_and_the_pictures_size(xl: Path) -> None:
    reference = encoded(xl)
    reference.draw_at(64, 96)
    assert [item.name for item in reference.inputs[3:]] == ["text_embeds", "time_ids"]
    assert {item.within for item in reference.inputs[3:]} == {"added_cond_kwargs"}
    assert reference.conditions.arrays["text_embeds"].shape == (len(PROMPTS), CLIP)
    assert not reference.conditions.null["encoder_hidden_states"].any(), "XL's null is zeros"
    timesteps: list[Any] = []

    def watched(feed: Any) -> Any:
        timesteps.append(feed["time_ids"])
        return reference.forward(feed)

    chosen = np.asarray([1, 3])
    actual = reference.draw(watched, reference.noise(2, SEED), chosen, steps=4, guidance=5.0)
    exact = drawn_by_unet_pipeline(xl, reference, chosen, 5.0, SEED)
    assert np.abs(actual - exact).max() <= 1e-5 * np.abs(exact).max()
    assert timesteps[0].tolist() == [[64, 96, 0, 0, 64, 96]] * 4


def test_a_network_that_predicts_velocities_draws_the_pipelines_pictures(plain: Path, tmp_path: Path) -> None:
    folder = save_unet(tmp_path / "velocity", prediction="v_prediction")
    latents = []
    for place in (plain, folder):
        reference, chosen = encoded(place), np.asarray([0])
        actual = reference.draw(reference.forward, reference.noise(1, SEED), chosen, steps=4, guidance=3.0)
        exact = drawn_by_unet_pipeline(place, reference, chosen, 3.0, SEED)
        assert np.abs(actual - exact).max() <= 1e-5 * np.abs(exact).max()
        latents.append(actual)
    assert np.abs(latents[0] - latents[1]).max() > 0.1 * np.abs(latents[0]).max()


def test_a_latent_consistency_model_reads_its_guidance_scale(tmp_path: Path) -> None:
    folder = save_lcm(tmp_path)
    reference, chosen = encoded(folder), np.asarray([1, 3])
    assert (reference.sampler, reference.guided_by, reference.conditions.null) == ("LCMScheduler", "input", {})
    latents, timesteps = [], []

    def watched(feed: Any) -> Any:
        timesteps.append(feed["timestep_cond"])
        return reference.forward(feed)

    for guidance in (2.0, 8.5):
        actual = reference.draw(watched, reference.noise(2, SEED), chosen, steps=4, guidance=guidance)
        exact = drawn_by_unet_pipeline(folder, reference, chosen, guidance, SEED)
        assert np.abs(actual - exact).max() <= 1e-5 * np.abs(exact).max()
        latents.append(actual)
    assert {rows.shape for rows in timesteps} == {(2, SCALE)}, "one call a step for both pictures, none without a prompt"
    assert np.abs(latents[0] - latents[1]).max() > 1e-4 * np.abs(latents[0]).max()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler").rmdir()
    assert load_reference(str(folder)).sampler == "LCMScheduler"


@pytest.mark.parametrize(
    ("size", "nearest"), [((72, 64), "64x64"), ((64, 90), "64x96"), ((4, 64), "16x64"), ((4096, 64), "256x64")]
)
def test_sizes_that_the_levels_do_not_halve_are_refused_with_the_nearest(
    size: tuple[int, int], nearest: str, plain: Path
) -> None:
    reference = load_reference(str(plain))
    with pytest.raises(ModelError, match=rf"^size {size[0]}x{size[1]}: .*; the nearest is {nearest}$"):
        reference.draw_at(*size)
    reference.draw_at(*map(int, nearest.split("x")))


@pytest.mark.parametrize("scale", [{}, XL])
def test_published_configurations_are_accepted(scale: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    require_values(UNet2DConditionModel, UNetValues, SD15, Path("config.json"))
    xl = {"attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10]}
    types = {key: SD15[key][-3:] for key in ("down_block_types", "up_block_types")}  # type: ignore[index]
    text = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
    require_values(UNet2DConditionModel, UNetValues, {**SD15, **xl, **types, **text}, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, r"do not fit each other: conv_in.weight"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep': expected None"),
        ({"addition_embed_type": "image"}, "addition_embed_type = 'image'"),
        ({"time_cond_proj_dim": 2}, "time_cond_proj_dim = 2: expected greater than or equal to 4"),
        (
            {"time_cond_proj_dim": 256},
            "do not fit each other: the weights lack 1 of the network's tensors",
        ),
        ({"sample_size": 9}, "sample_size 9: expected a multiple of 2, which 2 levels halve"),
        ({"block_out_channels": [32]}, "down_block_types: expected 1 of them"),
        ({"layers_per_block": [1, 1, 1]}, "layers_per_block: expected a number, or 2 of them"),
        ({"norm_num_groups": 5}, "block_out_channels 32: expected a multiple of norm_num_groups 5"),
        ({"attention_head_dim": 5}, "block_out_channels 32: expected a multiple of attention_head_dim 5"),
        ({**XL, "projection_class_embeddings_input_dim": 24}, "projection_class_embeddings_input_dim 24: expected 6 times"),
        ({"cross_attention_dim": 48}, "config.json and weights do not fit each other"),
    ],
)
def test_other_configurations_are_refused(changes: dict[str, Any], message: str, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    edit(folder / "unet" / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_reference(str(folder))


def test_recipes_give_convolutions_what_they_can_have(plain: Path) -> None:
    """An option that the recipe sets for all linears skips convolutions; a rule that sets it for one is refused."""
    linears = load_reference(str(plain)).linears
    name = "mid_block.resnets.0.conv1"

    def assigned(**values: Any) -> Any:
        recipe = Recipe.parse({"model": "m", **values}, "test")
        return recipe.model_copy(update={"rules": recipe.rules or UNET.rules}).assign(linears)

    assert assigned(bits="w8a8")[name].scheme == scheme_of("w8a8")
    tokens = assigned(granularity="token")
    assert tokens["mid_block.attentions.0.transformer_blocks.0.ff.net.2"].scheme.per_token
    assert tokens[name].scheme == scheme_of("w8a8")
    assert tokens[name].reason == "a convolution takes one scale for its input"
    packed = assigned(bits="w4a16")
    assert (packed[name].action, packed[name].reason) == ("float", "no kernel unpacks a convolution's weight")
    rest = [{"match": "", "action": "float"}]
    for rule, message in (
        ({"granularity": "token", "action": "w8a8"}, "whose patches share pixels: granularity token does not exist for it"),
        ({"action": "w4a16"}, "whose weight no kernel unpacks; set its action to w8a8 or float"),
    ):
        with pytest.raises(RecipeError, match=f"'{name}' is a convolution, {message}"):
            assigned(rules=[{"match": name, **rule}, *rest])


def without_second(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    rest = {name: [None, None] if name.endswith("_2") else entry for name, entry in index.items()}
    (folder / "model_index.json").write_text(json.dumps(rest))


def of_pipeline(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_second, r"tokenizer_2 is \[None, None\]; expected \['transformers', one of .*download the whole pipeline"),
        *(
            (of_pipeline(name), f"'{name}' does not draw with the family unet; expected StableDiffusionPipeline or")
            for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline")
        ),
    ],
)
def test_a_pipeline_without_what_its_network_needs_is_refused(
    spoil: Callable[[Path], None], message: str, xl: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(xl, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_reference(str(folder)).encode(PROMPTS, "cpu")


def test_a_text_encoder_of_another_width_is_refused(plain: Path, xl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    shutil.rmtree(folder / "unet")
    shutil.copytree(xl / "unet", folder / "unet")
    with pytest.raises(ModelError, match="the outputs of its text encoders do not fit its network"):
        load_reference(str(folder)).encode(PROMPTS, "cpu")


def test_short_names() -> None:
    assert {name: place for name, place in MODELS.items() if name in ("sd1.5", "sd2.1", "sdxl", "sdxl-turbo")} == {
        "sd1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 7.5),
        "sd2.1": ("stabilityai/stable-diffusion-2-1", 7.5),
        "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 5.0),
        "sdxl-turbo": ("stabilityai/sdxl-turbo", 1.0),
    }
    assert UNET.default_guidance == 7.5


def test_the_engine_stands_in_for_pipe_unet(plain: Path, tmp_path: Path) -> None:
    """Its convolutions run on codes, and their inputs are scaled by channel."""
    values = {"steps": 4, "parity_size": 1, "guidance_scale": 2.0, "calib_size": 2, "scaling": "smooth", "bits": "w8a8"}
    report = run(Recipe.parse({"model": str(plain), "format": "ort", **values}, "test"), tmp_path / "out", until="verify")
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    convolution = next(gemm for gemm in report.audit.gemms if gemm.name == "mid_block.resnets.0.conv1")
    assert (convolution.flops, convolution.wanted, convolution.kernel) == (2 * 4 * 4 * 64 * 64 * 9, "w8a8", "ConvInteger")
    assert len([gemm for gemm in report.audit.gemms if gemm.kernel == "ConvInteger"]) == CONVOLUTIONS
    query = next(gemm for gemm in report.audit.gemms if gemm.name == "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert query.flops == 2 * 4 * 4 * 64 * 64, "of a value whose sizes the exporter alone knows"
    edges = {gemm.name: gemm.kernel for gemm in report.audit.gemms if gemm.name in ("conv_in", "conv_out")}
    assert edges == {"conv_in": "Conv", "conv_out": "Conv"}, "float, as all embedders and final projections"
    convolutions = {gemm.name for gemm in report.audit.gemms if gemm.kernel == "ConvInteger"}
    scaled = {item.name: item.fold for item in report.linears if item.name in convolutions and item.scaling == "smooth(0.5)"}
    assert set(scaled) == convolutions
    assert {fold for name, fold in scaled.items() if name.endswith(("conv_shortcut", "conv1"))} == {"a Mul on all tokens"}
    assert all(fold.startswith("group_norm") for name, fold in scaled.items() if name.endswith("proj_in")), "free"
    stand_in = dq_export.load(tmp_path / "out")
    assert repr(stand_in) == "StandIn of UNet2DConditionModel, to be set as pipe.unet"
    reference = encoded(plain)
    actual = drawn_by_unet_pipeline(plain, reference, np.asarray([0]), 2.0, SEED, stand_in)
    exact = drawn_by_unet_pipeline(plain, reference, np.asarray([0]), 2.0, SEED)
    assert 0 < np.abs(actual - exact).max() < 0.1 * np.abs(exact).max()
    output = stand_in(
        torch.zeros(2, 4, 8, 8), torch.tensor(5), encoder_hidden_states=torch.zeros(2, 77, TINY["cross_attention_dim"])
    )
    assert type(output).__name__ == "UNet2DConditionOutput"
    assert output.sample.shape == (2, 4, 8, 8)
    residuals = {"down_block_additional_residuals": (torch.zeros(2, 32, 8, 8),), "mid_block_additional_residual": torch.zeros(1)}
    with pytest.raises(TypeError, match="does not take down_block_additional_residuals, mid_block_additional_residual"):
        stand_in(torch.zeros(2, 4, 8, 8), 5, torch.zeros(2, 77, TINY["cross_attention_dim"]), **residuals)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "kernel", "minimum"),
    [
        ({"timesteps": "per-sample", "calibration": "progressive"}, "ConvInteger", 35),
        ({"bits": "w4a8", "rounding": "gptq"}, "ConvInteger", 25),
        ({"bits": "w6a6", "bias_correction": True}, "ConvInteger", 25),
        ({"provider": "openvino"}, "Convolution u8", 35),
        ({"format": "trt-rtx", "target": "sm89"}, "correlation Int8xInt8", None),
        ({"format": "trt-rtx", "target": "sm89", "bits": "fp8"}, "correlation FP8xFP8", None),
    ],
    ids=["per-sample", "w4a8", "w6a6", "openvino", "trt-rtx", "fp8"],
)
def test_convolutions_run_on_codes_on_every_backend(
    values: dict[str, Any], kernel: str, minimum: float | None, plain: Path, tmp_path: Path
) -> None:
    quick = {"steps": 4, "parity_size": 1, "guidance_scale": 2.0, "calib_size": 2, "scaling": "smooth", "min_sqnr": -100}
    recipe = Recipe.parse({"model": str(plain), "format": "ort", **quick, **values}, "test")
    report = run(recipe, tmp_path / "out", until="audit" if minimum is None else "verify")
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert len([gemm for gemm in report.audit.gemms if gemm.kernel == kernel]) == CONVOLUTIONS
    if minimum is not None:
        assert report.parity is not None
        assert min(call.sqnr for call in report.parity.calls if call.stage == "engine") > minimum
