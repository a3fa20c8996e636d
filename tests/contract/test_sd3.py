"""What is Stable Diffusion 3's own: its runs of blocks, its three encoders, its folds, and the values that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import feed_of, run_onnx, sqnr
from sd3 import SHIFT, drawn_by_sd3_pipeline, save_clip, save_sd3, sd3_pipeline
from toy import PROMPTS

from dq_export.core.network import Conditions
from dq_export.families.checkpoint import open_checkpoint
from dq_export.families.reference import ModelError
from dq_export.families.sd3 import SD3_FAMILY
from dq_export.families.sd3_values import SD3Values
from dq_export.families.source import MODELS, load_reference
from dq_export.families.text_encoders import encoder_bytes, require_prompts

HUB: dict[str, dict[str, Any]] = {
    "sd3": {
        "_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128,
    },
    "sd3.5-medium": {
        "caption_projection_dim": 1536, "num_attention_heads": 24, "num_layers": 24, "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
    },
    "sd3.5-large": {
        "caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38, "pos_embed_max_size": 192,
        "dual_attention_layers": [], "qk_norm": "rms_norm",
    },
}  # fmt: skip
"""The keys that published checkpoints have."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_the_streams_of_a_joint_attention_share_one_scaling(folder: Path) -> None:
    reference = load_reference(str(folder))
    sites = {site.name: site for site in reference.sites}
    block = "transformer_blocks.0."
    parts = sites[f"{block}attn.to_add_out"].fold.parts
    assert [part.name for part in parts] == [f"{block}attn.{name}" for name in ("to_v", "add_v_proj")]
    assert sites[f"{block}attn.to_out.0"].shares == f"{block}attn.to_add_out"
    kinds = {name: (sites[site.shares] if site.shares else site).fold.kind for name, site in sites.items()}
    assert {name for name, kind in kinds.items() if kind == "token"} == {name for name in sites if name.endswith(".net.2")}
    roles = {linear.role for linear in reference.linears.values()}
    assert roles == {"gemm", "vector", "edge"}, "no linear works on the text alone but the embedder"


@pytest.mark.slow
def test_each_run_of_equal_blocks_is_traced_with_three_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four with dual attention, four without, and the last one, as in 3.5-medium."""
    from dq_export.families import torch_export

    depths, whole = [], torch_export._traced

    def traced(network: Any, *arguments: Any) -> Any:
        depths.append([name for name, _ in network.transformer_blocks.named_children()])
        return whole(network, *arguments)

    monkeypatch.setattr(torch_export, "_traced", traced)
    save_sd3(tmp_path / "model", num_layers=9, dual_attention_layers=[0, 1, 2, 3])
    reference: Any = load_reference(str(tmp_path / "model"))
    reference.conditions = reference.encode(PROMPTS, "cpu")
    (tmp_path / "float").mkdir()
    reference.export_onnx(tmp_path / "float" / "model.onnx", shared=True)
    assert depths == [["0", "1", "2", "4", "5", "6", "8"]]
    feed = feed_of(reference)
    assert sqnr(reference.forward(feed), run_onnx(tmp_path / "float" / "model.onnx", feed)) > 100


def test_pictures_of_another_scheduler_of_flows_are_diffusers_own(model: Path) -> None:
    """A sampler with two calls per step."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    FlowMatchHeunDiscreteScheduler(shift=SHIFT).save_pretrained(model / "scheduler")
    reference: Any = load_reference(str(model))
    reference.conditions = reference.encode(PROMPTS, "cpu")
    noise, chosen = reference.noise(2, 7), np.asarray([1, 3])
    latents = sd3_pipeline(model, scheduler="FlowMatchHeunDiscreteScheduler")(
        [PROMPTS[index] for index in chosen], num_inference_steps=3, guidance_scale=2.0, height=64, width=64,
        latents=torch.from_numpy(noise), output_type="latent",
    ).images.numpy()  # fmt: skip
    actual = reference.draw(reference.forward, noise, chosen, steps=3, guidance=2.0)
    np.testing.assert_allclose(actual, latents, rtol=0, atol=1e-5 * np.abs(latents).max())
    assert len(reference.timesteps(3)) == 5


def test_a_shift_by_the_pictures_size_is_the_pipelines(model: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dynamic_shifting": True}))
    reference: Any = load_reference(str(model))
    reference.conditions = reference.encode(PROMPTS, "cpu")
    chosen = np.asarray([2, 0])
    exact = drawn_by_sd3_pipeline(model, reference, chosen, 3.0, 7)
    actual = reference.draw(reference.forward, reference.noise(2, 7), chosen, steps=4, guidance=3.0)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    assert reference.timesteps(4) != load_reference(str(folder_of(model))).timesteps(4)


def folder_of(model: Path) -> Path:
    """A copy of a pipeline with the fixed shift."""
    copy = Path(shutil.copytree(model, model.parent / "fixed"))
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dynamic_shifting": False}))
    return copy


def test_without_guidance_no_null_is_needed(folder: Path) -> None:
    reference = load_reference(str(folder))
    encoded = reference.encode(PROMPTS, "cpu")
    reference.conditions = Conditions(names=PROMPTS, arrays=encoded.arrays, null={})
    chosen = np.asarray([2, 0])
    exact = drawn_by_sd3_pipeline(folder, reference, chosen, 1.0, 7)
    actual = reference.draw(reference.forward, reference.noise(2, 7), chosen, steps=4, guidance=1.0)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_without_t5_its_states_are_zeros(tmp_path: Path) -> None:
    """As diffusers has it."""
    model = save_sd3(tmp_path / "model", t5=False)
    actual = load_reference(str(model)).encode(PROMPTS, "cpu")
    exact = sd3_pipeline(model).encode_prompt(list(PROMPTS), None, None, max_sequence_length=256)
    for part, tensor in zip(
        (actual.arrays["encoder_hidden_states"], actual.arrays["pooled_projections"]), (exact[0], exact[2]), strict=True
    ):
        np.testing.assert_allclose(part, tensor.detach().numpy(), rtol=0, atol=1e-6)
    assert not actual.arrays["encoder_hidden_states"][:, 77:].any()
    assert actual.arrays["encoder_hidden_states"][:, :77].any()


def test_one_encoder_must_read_the_whole_prompt(folder: Path, tmp_path: Path) -> None:
    """CLIP's tokens are letters here; T5's are words."""
    checkpoint = open_checkpoint(folder)
    require_prompts(SD3_FAMILY, checkpoint, ["a red square " * 10])
    with pytest.raises(
        ModelError, match=r"^prompt 1 \('a .*'\): 301 tokens, and StableDiffusion3Pipeline takes 256; shorten it$"
    ):
        require_prompts(SD3_FAMILY, checkpoint, ["a red square " * 100])
    short = open_checkpoint(save_sd3(tmp_path / "model", t5=False))
    with pytest.raises(ModelError, match=r"^prompt 2 \('a .*'\): 102 tokens, and StableDiffusion3Pipeline takes 77; shorten it$"):
        require_prompts(SD3_FAMILY, short, ["a red square", "a red square " * 10])


def test_a_clip_of_any_transformers_is_read_and_its_old_positions_are_not(model: Path, folder: Path) -> None:
    """Half the width of its files, which are read one block at a time."""
    from safetensors.torch import load_file, save_file

    path = model / "text_encoder" / "model.safetensors"
    state = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    exact, actual = (load_reference(str(place)).encode(PROMPTS, "cpu").arrays["pooled_projections"] for place in (folder, model))
    np.testing.assert_allclose(actual, exact, rtol=0, atol=2e-3 * np.abs(exact).max())
    more = [encoder_bytes(SD3_FAMILY, open_checkpoint(place)) for place in (folder, model)]
    assert more[0] == sum((folder / f"text_encoder{n}/model.safetensors").stat().st_size for n in ("", "_2", "_3"))
    assert more[1] < more[0] + path.stat().st_size


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "t5's tokenizer alone": (
        lambda model: edit(model / "model_index.json", text_encoder_3=[None, None]),
        r"model_index\.json: tokenizer_3 without text_encoder_3; add what is missing, or leave out both, or pass --conditions",
    ),
    "no vocabulary": (
        lambda model: (model / "tokenizer_2" / "tokenizer.json").unlink(),
        r"tokenizer_2: no tokenizer\.json and no vocab\.json with merges\.txt; download it again",
    ),
    "longer than its encoder": (
        lambda model: edit(model / "tokenizer" / "tokenizer_config.json", model_max_length=512),
        r"tokenizer: fills texts up to model_max_length 512, and its encoder takes 77 tokens; correct its tokenizer_config",
    ),
    "activation": (
        lambda model: edit(model / "text_encoder" / "config.json", hidden_act="swish"),
        r"config\.json: hidden_act = 'swish': expected 'quick_gelu' or 'gelu'",
    ),
    "heads": (
        lambda model: edit(model / "text_encoder" / "config.json", num_attention_heads=3),
        r"config\.json: hidden_size 4: expected a multiple of num_attention_heads 3",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_encoders_are_refused_in_one_line(name: str, model: Path) -> None:
    damage, message = DAMAGE[name]
    damage(model)
    with pytest.raises(ModelError, match=message) as error:
        require_prompts(SD3_FAMILY, open_checkpoint(model), PROMPTS)
    assert "\n" not in str(error.value)


def test_an_encoder_of_another_width_does_not_fit_the_network(model: Path) -> None:
    save_clip(model, "_2", "CLIPTextModelWithProjection", width=8)
    with pytest.raises(
        ModelError, match=r"the outputs of its text encoders do not fit its network: pooled_projections has shape"
    ):
        load_reference(str(model)).encode(PROMPTS, "cpu")


def test_a_checkpoint_in_bfloat16_computes_in_float32(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    model = save_sd3(tmp_path / "model", dtype=torch.bfloat16)
    reference: Any = load_reference(str(model))
    reference.conditions = reference.encode(PROMPTS, "cpu")
    network = SD3Transformer2DModel.from_pretrained(model / "transformer").float().eval()
    feed = feed_of(reference, 500)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(rows) for name, rows in feed.items()}
        exact = network(**{**tensors, "timestep": tensors["timestep"].expand(3)}, return_dict=False)[0].numpy()
    assert sqnr(exact, reference.forward(feed)) > 90


def test_a_sampler_of_noise_is_refused(model: Path) -> None:
    edit(model / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    with pytest.raises(
        ModelError,
        match=r"^\S+scheduler_config\.json: DDIMScheduler does not sample a network that predicts the velocity of a flow; put "
        r"the scheduler there that the network was trained for, for example FlowMatchEulerDiscreteScheduler$",
    ):
        load_reference(str(model))


def test_a_network_alone_has_its_papers_scheduler(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "transformer", tmp_path / "alone")
    alone, whole = load_reference(str(tmp_path / "alone")), load_reference(str(folder))
    assert alone.timesteps(4) == whole.timesteps(4)
    assert whole.timesteps(4)[1] == pytest.approx(857.69, abs=0.01)


def test_the_short_names_are_the_published_models() -> None:
    assert {name: place for name, place in MODELS.items() if name.startswith("sd3")} == {
        "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", 7.0),
        "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", 4.5),
        "sd3.5-large": ("stabilityai/stable-diffusion-3.5-large", 3.5),
    }


@pytest.mark.parametrize("name", HUB)
def test_the_published_configurations_are_accepted_without_memory_for_positions(name: str) -> None:
    from diffusers import SD3Transformer2DModel

    from dq_export.families.loading import make_empty

    network = make_empty(SD3Transformer2DModel, SD3Values, Path("config.json"), {**HUB["sd3"], **HUB[name]})
    assert {str(value.device) for value in network.state_dict().values()} == {"meta"}
    assert len(network.transformer_blocks) == {**HUB["sd3"], **HUB[name]}["num_layers"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, r"num_layers = 0: expected greater than or equal to 1"),
        (
            {"caption_projection_dim": 32},
            r"caption_projection_dim 32: expected 24, attention_head_dim 12 times num_att",
        ),
        ({"sample_size": 9}, r"sample_size 9: expected a multiple of patch_size 2"),
        ({"sample_size": 20}, r"sample_size 20: expected at most 18, pos_embed_max_size 9 patches of 2"),
        ({"attention_head_dim": 9, "caption_projection_dim": 18}, r"attention_head_dim 9 .* 2: expected a multiple of 4"),
        ({"out_channels": 8}, r"out_channels 8: expected in_channels 4"),
        ({"pos_embed_max_size": None}, r"pos_embed_max_size = None: expected a valid integer"),
        ({"qk_norm": "layer_norm"}, r"qk_norm = 'layer_norm': expected 'rms_norm'"),
        ({"dual_attention_layers": [0, "a"]}, r"dual_attention_layers\[1\] = 'a': expected a valid integer"),
    ],
)
def test_values_of_no_sd3_are_refused_by_file_and_key(changes: dict[str, Any], message: str, model: Path) -> None:
    edit(model / "transformer" / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        load_reference(str(model))
