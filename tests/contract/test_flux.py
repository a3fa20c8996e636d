"""What is FLUX's own: two kinds of block, its guidance, timesteps that depend on the picture's size, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import feed_of, run_onnx, sqnr
from flux import SIDE, drawn_by_flux_pipeline, flux_pipeline, save_flux
from toy import PROMPTS

from dq_export.core.network import Conditions
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.families.config_values import require_values
from dq_export.families.flux_values import FluxValues
from dq_export.families.reference import ModelError
from dq_export.families.source import MODELS, load_reference
from dq_export.pipeline import run

HUB = {
    "_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": True,
    "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
    "out_channels": None, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.slow
def test_both_kinds_of_block_are_traced_with_three_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dq_export.families import torch_export

    depths, whole = [], torch_export._traced

    def traced(network: Any, *arguments: Any) -> Any:
        depths.append((len(network.transformer_blocks), len(network.single_transformer_blocks)))
        return whole(network, *arguments)

    monkeypatch.setattr(torch_export, "_traced", traced)
    reference: Any = load_reference(str(save_flux(tmp_path / "model", num_layers=4, num_single_layers=5)))
    reference.draw_at(*SIDE)
    reference.conditions = reference.encode(PROMPTS, "cpu")
    (tmp_path / "float").mkdir()
    reference.export_onnx(tmp_path / "float" / "model.onnx", shared=True)
    assert depths == [(3, 3)]
    feed = feed_of(reference)
    assert sqnr(reference.forward(feed), run_onnx(tmp_path / "float" / "model.onnx", feed)) > 100


@pytest.mark.parametrize("side", [(64, 96), (256, 256)])
def test_timesteps_are_those_that_the_pipeline_sends_at_that_size(side: tuple[int, int], folder: Path) -> None:
    reference, timesteps = load_reference(str(folder)), []
    reference.draw_at(*side)
    pipeline = flux_pipeline(folder)
    pipeline.transformer.register_forward_pre_hook(
        lambda module, inputs, named: timesteps.append(float(named["timestep"][0])), with_kwargs=True
    )
    pipeline(PROMPTS[0], num_inference_steps=4, height=side[0], width=side[1], output_type="latent")
    assert reference.timesteps(4) == timesteps
    assert timesteps[0] == 1
    assert timesteps[1] == pytest.approx({64: 0.825, 256: 0.832}[side[0]], abs=2e-3)


def test_guidance_is_an_input_and_changes_the_picture(folder: Path) -> None:
    reference: Any = load_reference(str(folder))
    reference.draw_at(*SIDE)
    reference.conditions = reference.encode(PROMPTS, "cpu")
    assert (reference.guidance, reference.guided_by, dict(reference.conditions.null)) == (3.5, "input", {})
    latents = [drawn_by_flux_pipeline(folder, reference, np.asarray([0]), guidance, 7) for guidance in (1.0, 4.0)]
    actual = [reference.draw(reference.forward, reference.noise(1, 7), np.asarray([0]), steps=4, guidance=g) for g in (1.0, 4.0)]
    np.testing.assert_allclose(actual, latents, rtol=0, atol=1e-5 * np.abs(latents).max())
    assert np.abs(latents[0] - latents[1]).max() > 1e-3


def test_a_clip_of_published_files_is_the_same_encoder(folder: Path, model: Path) -> None:
    """Their tensors' names have a prefix, which transformers 5 does not write; old ones hold the positions, too."""
    from safetensors.torch import load_file, save_file

    path = model / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    exact, actual = (load_reference(str(place)).encode(PROMPTS, "cpu").arrays for place in (folder, model))
    np.testing.assert_array_equal(actual["pooled_projections"], exact["pooled_projections"])


def test_schnell_has_no_guidance_and_refuses_one_before_any_work(tmp_path: Path) -> None:
    model = save_flux(tmp_path / "model", guidance_embeds=False)
    edit(model / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    reference: Any = load_reference(str(model))
    assert (reference.guidance, reference.guided_by) == (1.0, "nothing")
    assert "guidance" not in [item.name for item in reference.inputs]
    assert reference.timesteps(4) == [1.0, 0.75, 0.5, 0.25]
    shutil.copytree(model / "transformer", tmp_path / "alone")
    assert load_reference(str(tmp_path / "alone")).timesteps(4) == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(RecipeError, match=r"^guidance_scale 3\.5: this network has no input for it, .*; leave it out$"):
        run(Recipe.parse({"model": str(model), "guidance_scale": 3.5}, "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "message"), [("100x96", "in steps of 16 pixels"), ("2048x2064", "tokens up to 16384")])
def test_a_size_that_it_does_not_draw_is_refused(size: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^size {size}: expected HEIGHTxWIDTH .*{message}"):
        run(Recipe.parse({"model": str(folder), "sizes": size}, "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_streams_share_one_scaling_and_the_single_blocks_fold_their_attention(folder: Path) -> None:
    reference = load_reference(str(folder))
    sites = {site.name: site for site in reference.sites}
    joint = sites["transformer_blocks.0.attn.to_out.0"]
    assert [part.name for part in joint.fold.parts] == [f"transformer_blocks.0.attn.{name}" for name in ("add_v_proj", "to_v")]
    assert sites["transformer_blocks.0.attn.to_add_out"].shares == joint.name
    single = sites["single_transformer_blocks.1.proj_out"].fold.parts
    assert [(part.kind, part.channels) for part in single] == [("linear", (0, 32)), ("token", (32, 160))]


def test_a_network_alone_has_devs_scheduler(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "transformer", tmp_path / "alone")
    alone, whole = load_reference(str(tmp_path / "alone")), load_reference(str(folder))
    for reference in (alone, whole):
        reference.draw_at(*SIDE)
    assert alone.timesteps(4) == whole.timesteps(4)


def test_a_file_of_conditions_needs_no_null(folder: Path, tmp_path: Path) -> None:
    from dq_export.core.condition_file import CONDITIONS, save_conditions

    rng = np.random.default_rng(0)
    sizes = {"encoder_hidden_states": (2, 6, 8), "pooled_projections": (2, 4)}
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    save_conditions(tmp_path / CONDITIONS, Conditions(names=("a", "b"), arrays=arrays, null={}))
    recipe = {"model": str(folder), "conditions": str(tmp_path / CONDITIONS), "sizes": "64x96", "steps": 2, "calib_size": 1}
    run(Recipe.parse(recipe, "test"), tmp_path / "out", until="conditions")


def test_the_short_names_are_the_published_models() -> None:
    assert MODELS["flux-dev"] == ("black-forest-labs/FLUX.1-dev", 3.5)
    assert MODELS["flux-schnell"] == ("black-forest-labs/FLUX.1-schnell", 1.0)


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False}])
def test_the_published_configurations_are_accepted(changes: dict[str, Any]) -> None:
    from diffusers import FluxTransformer2DModel

    require_values(FluxTransformer2DModel, FluxValues, {**HUB, **changes}, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_single_layers": 0}, r"num_single_layers = 0: expected greater than or equal to 1"),
        ({"axes_dims_rope": [4, 6, 8]}, r"axes_dims_rope \[4, 6, 8\]: expected even numbers whose sum is attention_head_dim 16"),
        ({"axes_dims_rope": [8, 8]}, r"axes_dims_rope = \[8, 8\]: "),
        ({"in_channels": 6}, r"in_channels 6: expected a multiple of 4"),
        ({"in_channels": 16, "out_channels": 8}, r"out_channels 8: expected in_channels 16; networks that also read a mask"),
        ({"patch_size": 2}, r"patch_size = 2: expected 1"),
    ],
)
def test_values_of_no_flux_are_refused_by_file_and_key(changes: dict[str, Any], message: str, model: Path) -> None:
    edit(model / "transformer" / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        load_reference(str(model))
