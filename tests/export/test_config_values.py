"""Values of configuration files: what is refused by key before anything is made, and what is accepted."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, feed_of, recipe_of, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_export.core.recipe import RecipeError
from dq_export.families import FAMILIES
from dq_export.families.config_values import SchedulerValues, require_values
from dq_export.families.decoder import load_vae
from dq_export.families.dit_values import DiTValues
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.families.vae_classes import CLASSES
from dq_export.families.vae_values import KlValues

HUB = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 72, "cross_attention_dim": None, "dropout": 0.0, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000, "num_layers": 28, "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8,
    "patch_size": 2, "sample_size": 32, "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
"""The keys that DiT's published configuration has."""
VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 256,
    "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "force_upcast": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**9}, r"num_layers = 1000000000: expected less than or equal to 512"),
        ({"num_layers": 0}, r"num_layers = 0: expected greater than or equal to 1"),
        ({"num_layers": 2.0}, r"num_layers = 2.0: expected a valid integer"),
        ({"num_layers": "2"}, r"num_layers = '2': expected a valid integer"),
        ({"num_layers": True}, r"num_layers = True: expected a valid integer"),
        ({"num_layers": None}, r"num_layers = None: expected a valid integer"),
        ({"num_attention_heads": 10**300}, r"num_attention_heads = 1000.*expected less than or equal to 1024"),
        ({"attention_head_dim": -16}, r"attention_head_dim = -16: expected greater"),
        ({"attention_head_dim": 9, "num_attention_heads": 2}, r"attention_head_dim 9 times .* 2: expected a multiple of 4"),
        ({"sample_size": 9}, r"sample_size 9: expected a multiple of patch_size 2"),
        (
            {"sample_size": 8192, "patch_size": 1},
            r"sample_size 8192: expected at most 1048576 patches at width 32, found 6710",
        ),
        ({"sample_size": [8, 8]}, r"sample_size = \[8, 8\]: expected a valid integer"),
        ({"patch_size": 0}, r"patch_size = 0: expected greater"),
        ({"activation_fn": "relu"}, r"activation_fn = 'relu': expected 'gelu', 'gelu-approximate'"),
        ({"num_embeds_ada_norm": None}, r"num_embeds_ada_norm = None: expected a valid integer"),
        ({"out_channels": 3}, r"out_channels 3: expected in_channels 2, or twice as many for a learned sigma"),
        ({"norm_eps": 0}, r"norm_eps = 0: expected greater than 0"),
        ({"attention_bias": "yes"}, r"attention_bias = 'yes': expected a valid boolean"),
        ({"num_layers": 0, "patch_size": 0}, r"num_layers = 0: .*; patch_size = 0: .*; correct it, or download it again"),
    ],
)
def test_a_value_that_no_network_has_is_refused_by_file_and_key(
    folder: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    for path in (folder / "transformer").iterdir():
        (tmp_path / "transformer" / path.name).hardlink_to(path)
    config = tmp_path / "transformer" / "config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(json.dumps({**json.loads(text), **changes}))
    start = time.monotonic()
    with pytest.raises(ModelError, match=rf"transformer/config.json: {message}") as error:
        load_reference(str(tmp_path))
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 30, "nothing of that size was made"


def test_the_published_configurations_are_accepted() -> None:
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    require_values(DiTTransformer2DModel, DiTValues, HUB, Path("config.json"))
    require_values(AutoencoderKL, KlValues, VAE, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 10**9}, r"layers_per_block = 1000000000: expected less than or equal to 32"),
        ({"block_out_channels": 128}, r"block_out_channels = 128: expected a valid list"),
        ({"block_out_channels": [128, -1, 512, 512]}, r"block_out_channels\[1\] = -1: expected greater"),
        ({"block_out_channels": [128] * 3}, r"down_block_types: expected 3 of them, one for each of block_out_channels"),
        ({"block_out_channels": [128, 100, 512, 512]}, r"block_out_channels 100: expected a multiple of norm_num_groups 32"),
        ({"scaling_factor": 0}, r"scaling_factor = 0: expected greater than 0.000001"),
        ({"scaling_factor": "x"}, r"scaling_factor = 'x': expected a valid number"),
        ({"act_fn": "os"}, r"act_fn = 'os': expected 'silu'"),
        ({"up_block_types": ["Linear"] * 4}, r"up_block_types\[0\] = 'Linear': expected 'UpDecoderBlock2D'"),
    ],
)
def test_a_vae_of_such_values_is_refused_by_file_and_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text(json.dumps({**VAE, **changes}))
    save_file({}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=rf"config.json: {message}"):
        load_vae(tmp_path, (4, 32, 32))


def test_every_key_that_diffusers_takes_has_a_type() -> None:
    """A key of a later diffusers shows here, and not as a traceback."""
    import diffusers

    from dq_export.families.prediction import FLOW, NOISE

    networks = [(name, family.values) for family in FAMILIES for name in family.architectures]
    for name, values in [*networks, *((item.name, item.values) for item in CLASSES)]:
        parameters = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
        assert parameters == set(values.model_fields), name
    keys: set[str] = set()
    for name in NOISE.schedulers | FLOW.schedulers:
        keys |= set(inspect.signature(getattr(diffusers, name).__init__).parameters)
    assert keys - {"self"} == set(SchedulerValues.model_fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(key=st.sampled_from(sorted(DiTValues.model_fields)), value=JSON)
def test_any_value_is_refused_or_makes_a_network(key: str, value: Any) -> None:
    """Without memory for parameters: what is accepted here must not fail there."""
    import torch
    from diffusers import DiTTransformer2DModel

    config = {**TINY, key: value}
    try:
        require_values(DiTTransformer2DModel, DiTValues, config, Path("config.json"))
    except ModelError as error:
        named = key in str(error)
    else:
        named = True
        if config["num_layers"] <= 8:
            with torch.device("meta"):
                DiTTransformer2DModel.from_config(config)
    assert named


@pytest.mark.slow
@settings(max_examples=4)
@given(
    heads=st.integers(1, 3), head_dim=st.sampled_from([4, 12, 16, 20]), channels=st.integers(1, 3), learned=st.booleans(),
    layers=st.integers(1, 3), patch=st.integers(1, 3), side=st.integers(1, 3), classes=st.integers(1, 4), bias=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"]),
)  # fmt: skip
def test_every_network_of_the_ranges_loads_computes_and_has_a_recipe(
    tmp_path_factory: pytest.TempPathFactory, heads: int, head_dim: int, channels: int, learned: bool, layers: int, patch: int,
    side: int, classes: int, bias: bool, activation: str,
) -> None:  # fmt: skip
    out = 2 * channels if learned else channels
    folder = save_tiny(
        tmp_path_factory.mktemp("any"), num_attention_heads=heads, attention_head_dim=head_dim, in_channels=channels,
        out_channels=out, num_layers=layers, patch_size=patch, sample_size=side * patch, num_embeds_ada_norm=classes,
        attention_bias=bias, activation_fn=activation,
    )  # fmt: skip
    reference = load_reference(str(folder))
    output = reference.forward(feed_of(reference))
    assert output.shape == (3, out, side * patch, side * patch)
    assert np.isfinite(output).all()
    if side == 1:  # one token: each GEMM has one row for each sample, as those that are never quantized
        with pytest.raises(RecipeError, match="leave no linear to quantize"):
            recipe_of(reference).assign(reference.linears)
        return
    assigned = recipe_of(reference).assign(reference.linears)
    for name, rule in assigned.items():
        width = reference.linears[name].width
        assert reference.weight(name).shape[1] % (rule.scheme.block_size(width) or 1) == 0
    assert len(reference.timesteps(4)) == 4
