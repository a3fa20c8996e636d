"""What is FLUX.2's own: klein's prompts, dev's guidance, timesteps that depend on the picture's size, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sqnr
from flux2 import SIDE, TEXT, flux2_pipeline, save_flux2
from json_file import edit
from toy import PROMPTS

from dq_export.core.network import Conditions
from dq_export.families.config_values import require_values
from dq_export.families.flux2_values import Flux2Values
from dq_export.families.reference import ModelError
from dq_export.families.source import MODELS, load_reference, locate
from dq_export.families.text_encoders import require_prompts

KLEIN = {
    "_class_name": "Flux2Transformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32], "eps": 1e-06,
    "guidance_embeds": False, "in_channels": 128, "joint_attention_dim": 7680, "mlp_ratio": 3.0, "num_attention_heads": 24,
    "num_layers": 5, "num_single_layers": 20, "out_channels": None, "patch_size": 1, "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}  # fmt: skip
DEV = {"guidance_embeds": True, "joint_attention_dim": 15360, "num_attention_heads": 48, "num_layers": 8, "num_single_layers": 48}
BASE = {"num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux2(tmp_path_factory.mktemp("flux2"))


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.mark.parametrize("side", [SIDE, (160, 160)])
def test_timesteps_are_those_that_the_pipeline_sends_at_that_size(side: tuple[int, int], folder: Path) -> None:
    """At another size, calibration gets those of the first size."""
    reference, values = load_reference(str(folder)), []
    reference.draw_at(*side)
    pipeline = flux2_pipeline(folder)
    pipeline.transformer.register_forward_pre_hook(
        lambda module, inputs, named: values.append(float(named["timestep"][0])), with_kwargs=True
    )
    pipeline(prompt=PROMPTS[0], height=side[0], width=side[1], **BASE)
    timesteps = reference.timesteps(4)
    assert timesteps == values
    with reference.at((96, 96)):
        assert reference.timesteps(4) != timesteps
    with reference.drawing((96, 96)):
        assert reference.timesteps(4) == timesteps


def test_devs_guidance_is_an_input_and_changes_the_picture(tmp_path: Path) -> None:
    folder = save_flux2(tmp_path / "model", guidance_embeds=True)
    reference: Any = load_reference(str(folder))
    reference.draw_at(*SIDE)
    assert (reference.guidance, reference.guided_by) == (4.0, "input")
    text = np.random.default_rng(0).normal(size=(1, 6, 3 * TEXT)).astype(np.float32)
    reference.conditions = Conditions(names=("a",), arrays={"encoder_hidden_states": text}, null={})
    noise, arrays = reference.noise(1, 7), []
    packed = torch.from_numpy(noise).transpose(1, 2).unflatten(2, (SIDE[0] // 16, SIDE[1] // 16))

    def keep(pipeline: Any, step: int, timestep: Any, values: Any) -> Any:
        arrays.append(values["latents"].numpy())
        return {}

    latents, actual = [], []
    for guidance in (1.0, 4.0):
        flux2_pipeline(folder)(
            prompt_embeds=torch.from_numpy(text), height=SIDE[0], width=SIDE[1], latents=packed, guidance_scale=guidance,
            callback_on_step_end=keep, **BASE,
        )  # fmt: skip
        latents.append(arrays[-1])
        actual.append(reference.draw(reference.forward, noise, np.asarray([0]), steps=4, guidance=guidance))
    np.testing.assert_allclose(actual, latents, rtol=0, atol=1e-5 * np.abs(latents).max())
    assert np.abs(latents[0] - latents[1]).max() > 1e-3


def test_klein_reads_prompts_as_its_pipeline_does_and_runs_no_template_of_the_checkpoint(folder: Path, model: Path) -> None:
    """A chat template is a program; this one would write another text."""
    exact, _ = flux2_pipeline(folder).encode_prompt(list(PROMPTS))
    (model / "tokenizer" / "chat_template.jinja").write_text("{% for message in messages %}another{% endfor %}")
    for place in (folder, model):
        actual = load_reference(str(place)).encode(PROMPTS, "cpu")
        assert not actual.null
        assert sqnr(exact.detach().numpy(), actual.arrays["encoder_hidden_states"]) > 110


def test_a_prompt_that_is_too_long_is_refused_with_the_tokens_around_it(folder: Path) -> None:
    source = locate(str(folder))
    around = len("user\n\nassistant\n\n\n\n\n") + 5  # single bytes and five marks
    require_prompts(source.family, source.checkpoint, ["a" * (512 - around)])
    with pytest.raises(ModelError, match=r"^prompt 1 .*: 513 tokens, and Flux2KleinPipeline takes 512; shorten it$"):
        require_prompts(source.family, source.checkpoint, ["a" * (513 - around)])


def test_a_qwen_of_older_files_has_its_rotations_base_alone(folder: Path, model: Path) -> None:
    path = model / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": None}))
    exact, actual = (load_reference(str(place)).encode(PROMPTS, "cpu").arrays for place in (folder, model))
    np.testing.assert_array_equal(actual["encoder_hidden_states"], exact["encoder_hidden_states"])
    edit(path, rope_theta=3.0)
    other = load_reference(str(model)).encode(PROMPTS, "cpu").arrays
    assert np.abs(other["encoder_hidden_states"] - exact["encoder_hidden_states"]).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 26}, r"num_hidden_layers = 26: expected greater than or equal to 27"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, r"rope_parameters = .*: expected 'default'"),
        ({"rope_parameters": None, "rope_theta": "x"}, r"rope_parameters = .*: "),
        ({"num_key_value_heads": 3}, r"num_attention_heads 2: expected a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, r"head_dim = 5: expected a multiple of 2"),
        ({"use_sliding_window": True}, r"use_sliding_window = True: expected False"),
    ],
)
def test_values_of_no_qwen3_are_refused_by_file_and_key(changes: dict[str, Any], message: str, model: Path) -> None:
    edit(model / "text_encoder" / "config.json", **changes)
    source = locate(str(model))
    with pytest.raises(ModelError, match=rf"text_encoder/config\.json: {message}"):
        require_prompts(source.family, source.checkpoint, PROMPTS)


def test_devs_text_encoder_is_refused_with_the_way_around_it(model: Path) -> None:
    edit(
        model / "model_index.json", _class_name="Flux2Pipeline", text_encoder=["transformers", "Mistral3ForConditionalGeneration"]
    )
    source = locate(str(model))
    with pytest.raises(ModelError, match=r"text_encoder is .*Mistral3.*; expected .* or pass --conditions FILE"):
        require_prompts(source.family, source.checkpoint, PROMPTS)


@pytest.mark.slow
def test_the_streams_share_one_scaling_and_all_blocks_one_modulation(folder: Path) -> None:
    """A modulation of all blocks absorbs no scaling of a single block; a vector of each block does."""
    sites = {site.name: site for site in load_reference(str(folder)).sites}
    joint = sites["transformer_blocks.0.attn.to_add_out"]
    assert [part.name for part in joint.fold.parts] == [f"transformer_blocks.0.attn.{name}" for name in ("add_v_proj", "to_v")]
    assert sites["transformer_blocks.0.attn.to_out.0"].shares == joint.name
    normed = [sites[f"transformer_blocks.{index}.attn.to_q"].fold.parts for index in (0, 1)]
    assert [[part.kind for part in parts] for parts in normed] == [["norm", "vector"]] * 2
    assert [part.kind for part in sites["transformer_blocks.1.ff.linear_out"].fold.parts] == ["linear"]
    assert [part.kind for part in sites["single_transformer_blocks.1.attn.to_out"].fold.parts] == ["token"]


def test_the_short_name_is_the_published_model() -> None:
    assert MODELS["flux2-klein"] == ("black-forest-labs/FLUX.2-klein-4B", 1.0)


@pytest.mark.parametrize("changes", [{}, DEV])
def test_the_published_configurations_are_accepted(changes: dict[str, Any]) -> None:
    from diffusers import Flux2Transformer2DModel

    require_values(Flux2Transformer2DModel, Flux2Values, {**KLEIN, **changes}, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes_dims_rope": [4, 6, 6]}, r"axes_dims_rope = \[4, 6, 6\]: "),
        ({"axes_dims_rope": [4, 4, 4, 6]}, r"axes_dims_rope \[4, 4, 4, 6\]: expected even numbers whose sum is"),
        ({"in_channels": 6}, r"in_channels 6: expected a multiple of 4"),
        ({"timestep_guidance_channels": 31}, r"timestep_guidance_channels = 31: expected a multiple of 2"),
        ({"mlp_ratio": 0}, r"mlp_ratio = 0: expected greater than or equal to 1"),
    ],
)
def test_values_of_no_flux2_are_refused_by_file_and_key(changes: dict[str, Any], message: str, model: Path) -> None:
    edit(model / "transformer" / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        load_reference(str(model))
