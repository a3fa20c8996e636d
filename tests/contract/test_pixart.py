"""What is PixArt's own: its folds, its position embedding, its old layout on the hub, and the values that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from json_file import edit
from pixart import ALPHA, TINY, drawn_by_pixart_pipeline, save_pixart
from toy import PROMPTS

from dq_export.core.network import Conditions
from dq_export.families.config_values import require_values
from dq_export.families.pixart import PIXART
from dq_export.families.pixart_values import PixArtValues
from dq_export.families.reference import ModelError
from dq_export.families.source import MODELS, load_reference, locate

HUB = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 72, "attention_type": "default", "caption_channels": 4096,
    "cross_attention_dim": 1152, "double_self_attention": False, "dropout": 0.0, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_eps": 1e-06, "norm_num_groups": 32, "norm_type": "ada_norm_single",
    "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28, "num_vector_embeds": None,
    "only_cross_attention": False, "out_channels": 8, "patch_size": 2, "sample_size": 128, "upcast_attention": False,
    "use_linear_projection": False,
}  # fmt: skip
"""The keys that the first PixArt checkpoints have."""


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pixart(tmp_path_factory.mktemp("sigma"))


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pixart(tmp_path_factory.mktemp("alpha"), pipeline="PixArtAlphaPipeline", **ALPHA)


def test_keys_and_values_of_the_text_are_static_and_the_modulation_is_outside_the_blocks(sigma: Path) -> None:
    roles = {name: linear.role for name, linear in load_reference(str(sigma)).linears.items()}
    text = {f"transformer_blocks.{block}.attn2.{name}" for block in range(4) for name in ("to_k", "to_v")}
    assert {name for name, role in roles.items() if role == "static"} == text
    edges = {name for name, role in roles.items() if role == "edge"}
    embedder = [f"timestep_embedder.linear_{number}" for number in (1, 2)]
    assert edges == {
        *(f"adaln_single.emb.{name}" for name in embedder), "adaln_single.linear", "proj_out",
        *(f"caption_projection.linear_{number}" for number in (1, 2)),
    }  # fmt: skip
    assert set(roles.values()) == {"static", "edge", "gemm"}


def test_a_package_that_the_pipeline_needs_is_named_with_the_way_to_get_it(sigma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers without transformers has classes whose use fails; the scheduler is not to blame for that."""
    import diffusers
    from diffusers.utils import dummy_torch_and_transformers_objects as dummies

    monkeypatch.setattr(diffusers, "PixArtSigmaPipeline", dummies.PixArtSigmaPipeline)
    with pytest.raises(ModelError, match=r"^diffusers' PixArtSigmaPipeline needs transformers; pip install 'dq-export\[text\]'$"):
        load_reference(str(sigma)).timesteps(4)


def test_scalings_fold_into_norms_values_and_the_texts_projection(sigma: Path) -> None:
    """A vector for each site behind the shared modulation; operations on tokens before the queries of the text, which read
    the residual stream, and behind GELU."""
    block, reference = "transformer_blocks.1", load_reference(str(sigma))
    actual = {
        site.name.removeprefix(f"{block}."): (
            site.fold.kind,
            [part.name.removeprefix(f"{block}.") for part in site.fold.parts if part.kind == "linear"],
        )
        for site in reference.sites
        if site.name.startswith(block)
    }
    assert actual == {
        "attn1.to_q": ("vector", []),
        "attn1.to_out.0": ("free", ["attn1.to_v"]),
        "attn2.to_q": ("token", []),
        "attn2.to_out.0": ("free", ["attn2.to_v"]),
        "ff.net.0.proj": ("vector", []),
        "ff.net.2": ("token", []),
    }
    text = next(site for site in reference.sites if "attn2.to_k" in site.name)
    assert len(text.linears) == 8, "keys and values of all blocks read one text"
    assert [(part.kind, part.name) for part in text.fold.parts] == [("linear", "caption_projection.linear_2")]


@pytest.mark.parametrize(("size", "patch", "scale"), [(8, 2, None), (16, 2, 2.0), (12, 3, 0.5)])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1)])
def test_positions_are_diffusers_own_on_every_grid(size: int, patch: int, scale: float | None, grid: tuple[int, int]) -> None:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    network = PixArtTransformer2DModel(**{**TINY, "sample_size": size, "patch_size": patch, "interpolation_scale": scale}).eval()
    copy = PixArtTransformer2DModel.from_config(network.config).eval()
    copy.load_state_dict(network.state_dict())
    PIXART.prepare(copy)
    pixels = torch.randn(2, 4, size * grid[0], size * grid[1])
    with torch.no_grad():
        exact, actual, second = network.pos_embed(pixels), copy.pos_embed(pixels), copy.pos_embed(pixels)
        bare = copy.pos_embed.proj(pixels).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-6)
    assert torch.equal(actual, second)
    assert float((exact - bare).abs().max()) > 0.5, "there are positions"


def test_alpha_of_2023_is_the_same_model(alpha: Path, tmp_path: Path) -> None:
    """It is also called with the picture's size, which its configuration does not state."""
    shutil.copytree(alpha, tmp_path / "old")
    path = tmp_path / "old" / "transformer" / "config.json"
    changed = {**TINY, **ALPHA}
    path.write_text(json.dumps({**HUB, **changed}))
    old = load_reference(str(tmp_path / "old"))
    assert old.digest == load_reference(str(alpha)).digest
    assert [item.name for item in old.inputs][-2:] == ["resolution", "aspect_ratio"]
    assert old.guidance == 4.5
    old.conditions = old.encode(["a red square"], "cpu")
    assert old.conditions.arrays["resolution"].tolist() == [[1024.0, 1024.0]]
    assert old.conditions.arrays["encoder_attention_mask"].shape == (1, 120)


def test_without_guidance_no_null_is_needed(sigma: Path) -> None:
    reference = load_reference(str(sigma))
    encoded = reference.encode(PROMPTS, "cpu")
    reference.conditions = Conditions(names=PROMPTS, arrays=encoded.arrays, null={})
    chosen = np.asarray([2, 0])
    exact = drawn_by_pixart_pipeline(sigma, reference, chosen, 1.0, 7)
    actual = reference.draw(reference.forward, reference.noise(2, 7), chosen, steps=4, guidance=1.0)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_a_network_alone_has_pixarts_scheduler(sigma: Path, tmp_path: Path) -> None:
    shutil.copytree(sigma / "transformer", tmp_path / "alone")
    reference: Any = load_reference(str(tmp_path / "alone"))
    exact: Any = load_reference(str(sigma))
    assert reference.sampler == "DPMSolverMultistepScheduler"
    assert reference.timesteps(5) == exact.timesteps(5)
    np.testing.assert_array_equal(reference.scheduler.alphas_cumprod, exact.scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("name", "repository"), [("pixart", "PixArt-Sigma-XL-2-1024-MS"), ("pixart-alpha", "PixArt-XL-2-1024-MS")]
)
def test_the_short_names_are_the_published_models(
    name: str, repository: str, sigma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    shutil.copytree(sigma, tmp_path / f"models--PixArt-alpha--{repository}" / "snapshots" / "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = locate(name)
    assert (source.model, source.revision, source.guidance) == (name, "1", 4.5)
    assert MODELS[name][0] == f"PixArt-alpha/{repository}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, r"num_layers = 0: expected greater than or equal to 1"),
        ({"cross_attention_dim": None}, r"cross_attention_dim = None: expected a valid integer"),
        (
            {"cross_attention_dim": 32},
            r"cross_attention_dim 32: expected 48, attention_head_dim 24 times num_",
        ),
        ({"sample_size": 9}, r"sample_size 9: expected a multiple of patch_size 2"),
        ({"attention_head_dim": 9}, r"attention_head_dim 9 times num_attention_heads 2: expected a multiple of 4"),
        ({"out_channels": 5}, r"out_channels 5: expected in_channels 4, or twice as many"),
        ({"use_additional_conditions": True}, r"use_additional_conditions: .* at sample_size 128 alone, found 8"),
        (
            {"sample_size": 128, "attention_head_dim": 16, "cross_attention_dim": 32},
            r"attention_head_dim 16 times num_attention_heads 2: expected a multiple of 3, for height, width and aspect ratio",
        ),
        ({"interpolation_scale": 0}, r"interpolation_scale = 0: expected greater than 0"),
        ({"attention_type": "gated"}, r"attention_type = 'gated': expected 'default'"),
    ],
)
def test_values_of_no_pixart_are_refused_by_file_and_key(
    changes: dict[str, Any], message: str, sigma: Path, tmp_path: Path
) -> None:
    shutil.copytree(sigma, tmp_path / "model")
    edit(tmp_path / "model" / "transformer" / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        load_reference(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"_class_name": "PixArtTransformer2DModel", "use_additional_conditions": False, "interpolation_scale": 2},
        {"sample_size": 256, "interpolation_scale": 4, "use_additional_conditions": False},
        {"sample_size": 64, "interpolation_scale": None},
        {"sample_size": 32, "caption_channels": None, "cross_attention_dim": 4096},
    ],
)
def test_the_published_configurations_are_accepted(changes: dict[str, Any]) -> None:
    from diffusers import PixArtTransformer2DModel

    require_values(PixArtTransformer2DModel, PixArtValues, {**HUB, **changes}, Path("config.json"))
