"""What is the DDPMs' own: class labels, the folder without folders, old names of tensors, and the values that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddpm import CLASSES, drawn_by_ddpm_pipeline, save_ddpm
from json_file import edit

import dq_export
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.families.config_values import require_values
from dq_export.families.ddpm_values import DDPMValues
from dq_export.families.hub import SMALL, needed_files
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.pipeline import run

SEED = 3
CIFAR = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
"""google/ddpm-cifar10-32's config.json."""
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
CONVOLUTIONS, LINEARS = 23, 16
"""Of a tiny network's blocks."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ddpm(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ddpm(tmp_path_factory.mktemp("classes"), num_class_embeds=CLASSES)


@pytest.fixture(scope="module")
def flat(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As google/ddpm-cifar10-32 is on the hub: no folders, and the attention's linears under their old names."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("flat")
    for place in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copy(plain / place, folder)
    weights = "diffusion_pytorch_model.safetensors"
    tensors = load_file(plain / "unet" / weights)
    renamed = {}
    for name, tensor in tensors.items():
        for today, old in OLD.items():
            name = name.replace(f".{today}.", f".{old}.")
        renamed[name] = tensor
    assert len(renamed.keys() - tensors.keys()) == 2 * 4 * 4, "four attentions"
    save_file(renamed, folder / weights)
    return folder


def test_a_folder_without_folders_holds_the_same_network(plain: Path, flat: Path) -> None:
    actual, expected = load_reference(str(flat)), load_reference(str(plain))
    assert actual.digest == expected.digest
    assert actual.sampler == "DDPMScheduler"


def test_a_missing_scheduler_is_an_error(flat: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flat, tmp_path / "model"))
    (folder / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"names a scheduler, and there is no scheduler/scheduler_config\.json"):
        load_reference(str(folder))


def test_a_folder_without_folders_is_downloaded_with_its_scheduler(flat: Path) -> None:
    names = sorted(path.name for path in flat.iterdir())
    assert "scheduler_config.json" in SMALL
    assert sorted(needed_files([*names, "diffusion_pytorch_model.bin", "README.md"], "", "owner/name")) == names


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_a_class_label_draws_the_pipelines_pictures(name: str, classes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(classes, tmp_path / "model"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": f"{name}Scheduler"}))
    reference, labels = load_reference(str(folder)), np.asarray([1, 4])
    assert reference.conditions.names == ("0", "1", "2", "3", "4")
    noise = reference.noise(2, SEED)
    actual = reference.draw(reference.forward, noise, labels, steps=4, guidance=1.0)
    exact = drawn_by_ddpm_pipeline(folder, reference, labels, SEED, name=name)
    assert np.abs(actual - exact).max() <= 1e-5 * np.abs(exact).max()
    assert (np.abs(exact) < 0.99).mean() > 0.3, "pictures that are clipped everywhere would prove nothing"
    other = reference.draw(reference.forward, noise, np.asarray([1, 2]), steps=4, guidance=1.0)
    assert np.abs(other[0] - actual[0]).max() < 1e-5
    assert np.abs(other[1] - actual[1]).max() > 0.01


def test_published_configurations_are_accepted() -> None:
    from diffusers import UNet2DModel

    require_values(UNet2DModel, DDPMValues, CIFAR, Path("config.json"))
    celeba = {"attention_head_dim": 32, "block_out_channels": [224, 448, 672, 896], "sample_size": 64, "downsample_padding": 1}
    require_values(UNet2DModel, DDPMValues, {**CIFAR, **celeba}, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 4}, r"in_channels 4: expected out_channels 3; .*is not supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier': expected 'positional'"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, r"down_block_types\[0\] = 'SkipDownBlock2D'"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep': expected None"),
        ({"downsample_type": "resnet"}, "downsample_type = 'resnet': expected 'conv'"),
        ({"sample_size": 9}, "sample_size 9: expected a multiple of 2, which 2 levels halve"),
        ({"sample_size": [8, 16]}, r"sample_size = \[8, 16\]: expected a valid integer"),
        ({"sample_size": None}, "sample_size = None"),
        ({"attention_head_dim": 24}, "block_out_channels 32: expected a multiple of attention_head_dim 24, the width of a head"),
        ({"norm_num_groups": 5}, "block_out_channels 32: expected a multiple of norm_num_groups 5"),
        ({"attn_norm_num_groups": 5}, "block_out_channels 64: expected a multiple of attn_norm_num_groups 5"),
        ({"num_class_embeds": 3}, "config.json and weights do not fit each other"),
    ],
)
def test_other_configurations_are_refused(changes: dict[str, Any], message: str, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    edit(folder / "unet" / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_reference(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale 2: this network has no input for it"),
        ({"prompts": ["a cat"]}, "prompts: family ddpm draws no text; leave it out"),
        ({"sizes": "16x16"}, "size 16x16: family ddpm draws pictures of one size; leave it out"),
    ],
)
def test_values_that_such_a_network_does_not_take_are_refused(
    values: dict[str, Any], message: str, plain: Path, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, ModelError), match=message):
        run(Recipe.parse({"model": str(plain), "format": "ort", "steps": 4, **values}, "test"), tmp_path / "out")


def test_the_engine_stands_in_for_pipe_unet(classes: Path, tmp_path: Path) -> None:
    values = {"steps": 4, "parity_size": 1, "calib_size": 2, "scaling": "none", "bits": "w8a8"}
    report = run(Recipe.parse({"model": str(classes), "format": "ort", **values}, "test"), tmp_path / "out", until="verify")
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    kernels = [gemm.kernel for gemm in report.audit.gemms if gemm.wanted == "w8a8"]
    counts = {kind: kernels.count(kind) for kind in set(kernels)}
    assert counts == {"ConvInteger": CONVOLUTIONS, "MatMulIntegerToFloat": LINEARS}
    stand_in = dq_export.load(tmp_path / "out")
    assert repr(stand_in) == "StandIn of UNet2DModel, to be set as pipe.unet"
    reference, labels = load_reference(str(classes)), np.asarray([2])
    actual = drawn_by_ddpm_pipeline(classes, reference, labels, SEED, unet=stand_in)
    exact = drawn_by_ddpm_pipeline(classes, reference, labels, SEED)
    assert 0 < np.abs(actual - exact).max() < 0.1 * np.abs(exact).max()
    output = stand_in(torch.zeros(2, 3, 8, 8), 5, class_labels=torch.tensor([0, 4]))
    assert type(output).__name__ == "UNet2DOutput"
    with pytest.raises(ValueError, match="class_labels holds 5, and the network takes 0 to 4"):
        stand_in(torch.zeros(1, 3, 8, 8), 5, class_labels=torch.tensor([CLASSES]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "kernel"),
    [({"provider": "openvino"}, "Convolution u8"), ({"format": "trt-rtx", "target": "sm89"}, "correlation Int8xInt8")],
    ids=["openvino", "trt-rtx"],
)
def test_a_network_without_conditions_runs_on_codes_on_every_backend(
    values: dict[str, Any], kernel: str, plain: Path, tmp_path: Path
) -> None:
    quick = {"steps": 4, "parity_size": 1, "calib_size": 2, "scaling": "none"}
    recipe = Recipe.parse({"model": str(plain), "format": "ort", **quick, **values}, "test")
    report = run(recipe, tmp_path / "out", until="verify" if "provider" in values else "audit")
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert len([gemm for gemm in report.audit.gemms if gemm.kernel == kernel]) == CONVOLUTIONS
