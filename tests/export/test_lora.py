"""Low-rank adapters: as peft merges them, through a whole export, and every file that does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, feed_of, run_onnx, save_tiny
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import dq_export
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.families.reference import ModelError, Reference
from dq_export.families.source import load_reference
from dq_export.stages.bench import _pytorch
from dq_export.timing import _bound

TARGETS = ["to_q", "to_v", "ff.net.0.proj", "norm1.linear", "pos_embed.proj"]
Q = "transformer_blocks.0.attn1.to_q"


def adapted(tiny_folder: Path, seed: int, **changes: Any) -> Any:
    """peft's network around the tiny DiT, its matrices random."""
    reference: Any = load_reference(str(tiny_folder))
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **changes}
    network = get_peft_model(reference.model, LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, value in network.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn_like(value)
    return network


def merged(network: Any) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = network.merge_and_unload().state_dict()
    return weights


def require_equal(reference: Any, expected: dict[str, torch.Tensor]) -> None:
    state = reference.model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 9}, "rank_pattern": {"to_v": 2}}], ids=str
)
def test_pefts_files_add_what_peft_adds(changes: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    network = adapted(tiny_folder, 1, **changes)
    network.save_pretrained(tmp_path)
    plain = load_reference(str(tiny_folder))
    fused = load_reference(str(tiny_folder), lora=[str(tmp_path / "adapter_model.safetensors")])
    assert fused.digest != plain.digest
    require_equal(fused, merged(network))


@pytest.mark.parametrize("changes", [{}, {"alpha_pattern": {"to_q": 9}}], ids=str)
def test_diffusers_files_add_what_peft_adds(changes: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    """Written by the pipeline class whose networks have a loader."""
    network = adapted(tiny_folder, 1, **changes)
    settings = network.peft_config["default"].to_dict()
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(
            network.base_model.model, adapter_name="default", state_dict=plain_state(network)
        ),
        transformer_lora_adapter_metadata=json.loads(json.dumps(settings, default=str)),
    )
    (file,) = tmp_path.glob("*.safetensors")
    assert f"transformer.{Q}.lora_A.weight" in load_file(file)
    require_equal(load_reference(str(tiny_folder), lora=[str(file)]), merged(network))


def plain_state(network: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): value for name, value in network.state_dict().items()}


def pair(rank: int = 2, width: int = 32, outputs: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rank, width), torch.randn(outputs, rank)


def test_older_names_and_alphas_of_the_file(tiny_folder: Path, tiny: Reference, tmp_path: Path) -> None:
    down, up = pair()
    save_file(
        {f"{Q}.lora.down.weight": down, f"{Q}.lora.up.weight": up, f"{Q}.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors"
    )
    torch.save({f"transformer.{Q}.lora_down.weight": down, f"transformer.{Q}.lora_up.weight": up}, tmp_path / "b.bin")
    for name, strength in (("a.safetensors", 1.5), ("b.bin", 1.0)):
        reference = load_reference(str(tiny_folder), lora=[str(tmp_path / name)])
        np.testing.assert_allclose(reference.weight(Q), tiny.weight(Q) + strength * (up @ down).numpy(), rtol=1e-5, atol=1e-5)


def test_several_add_up_each_by_its_scale(tiny_folder: Path, tiny: Reference, tmp_path: Path) -> None:
    changes = []
    for seed in (0, 1):
        down, up = pair(seed=seed)
        save_file({f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}, tmp_path / f"{seed}.safetensors")
        changes.append((up @ down).numpy())
    words = [f"{tmp_path / '0.safetensors'}:0.25", f"{tmp_path / '1.safetensors'}:-2"]
    reference = load_reference(str(tiny_folder), lora=words)
    expected = tiny.weight(Q) + 0.25 * changes[0] - 2 * changes[1]
    np.testing.assert_allclose(reference.weight(Q), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted(tiny_folder, 2).save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def test_an_export_is_of_the_fused_network_and_repeats(adapter: Path, tiny_folder: Path, tiny: Reference, tmp_path: Path) -> None:
    """The float graph reads its weights from the checkpoint's files, but not those that an adapter changed."""
    options = {"lora": (f"{adapter}:0.5",), **QUICK}
    report = dq_export.export(model=str(tiny_folder), output_dir=tmp_path / "out", **options)
    fused, feed = load_reference(str(tiny_folder), lora=[f"{adapter}:0.5"]), feed_of(tiny)
    np.testing.assert_allclose(run_onnx(tmp_path / "out" / "float" / "model.onnx", feed), fused.forward(feed), atol=1e-4)
    assert np.abs(fused.forward(feed) - tiny.forward(feed)).max() > 1e-2
    assert report.digest == fused.digest
    recipe = Recipe.load(tmp_path / "out" / "recipe.yaml")
    timed = _pytorch(recipe, 2, tmp_path / "out", "cuda")[0][0]
    assert timed.device == "cuda"
    with _bound(replace(timed, device="cpu"), feed) as call:
        np.testing.assert_array_equal(call(), fused.forward(feed))
    assert recipe.lora == (f"{adapter}:0.5",)
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if value is not None}
    before = (tmp_path / "out" / "model.onnx").stat().st_mtime_ns
    dq_export.quantize(output_dir=tmp_path / "out", **values)
    assert (tmp_path / "out" / "model.onnx").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"lora .*: its sha256 is .*, and the recipe has 0+; put the recipe's file back, or"):
        dq_export.quantize(output_dir=tmp_path / "out", **{**values, "lora_sha256": ["0" * 64]})
    with pytest.raises(RecipeError, match="lora_sha256: 2 digests for 1 files of lora"):
        dq_export.quantize(output_dir=tmp_path / "out", **{**values, "lora_sha256": ["0" * 64] * 2})


A, B = pair()
GOOD = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "module": (
        {f"{Q}s.lora_A.weight": A, f"{Q}s.lora_B.weight": B},
        "'transformer_blocks.0.attn1.to_qs' is not a module of the network. Did you mean 'transformer_blocks.0.attn1.to_q'",
    ),
    "text encoder": (
        {"text_encoder.layers.0.q_proj.lora_A.weight": A, "text_encoder.layers.0.q_proj.lora_B.weight": B},
        "'text_encoder.layers.0.q_proj' is not a module of the network",
    ),
    "shape": (
        {f"{Q}.lora_A.weight": A[:, :5], f"{Q}.lora_B.weight": B},
        r"matrices of shapes \[32, 2\] and \[2, 5\]; the network's",
    ),
    "rank": (
        {f"{Q}.lora_A.weight": A[:1], f"{Q}.lora_B.weight": B},
        r"of shapes \[32, 2\] and \[1, 32\]; .*: it was trained for",
    ),
    "scalar": ({f"{Q}.lora_A.weight": A[0, 0], f"{Q}.lora_B.weight": B}, r"matrices of shapes \[32, 2\] and \[\]"),
    "half": ({f"{Q}.lora_A.weight": A}, "has only one of its two matrices"),
    "dora": (
        {**GOOD, f"{Q}.lora_magnitude_vector": A},
        "lora_magnitude_vector' is not part of a low-rank adapter of the network",
    ),
    "codes": ({f"{Q}.lora_A.weight": A.to(torch.int8), f"{Q}.lora_B.weight": B}, "in floating point"),
    "nan": ({f"{Q}.lora_A.weight": A * float("nan"), f"{Q}.lora_B.weight": B}, "makes NaN or Inf of 'transformer_blocks.0"),
    "alphas": ({**GOOD, f"{Q}.alpha": A[0]}, "alpha' is not part of a low-rank adapter of the network"),
    "empty": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(fault: str, tiny_folder: Path, tmp_path: Path) -> None:
    tensors, message = FAULTS[fault]
    path = tmp_path / "a.safetensors"
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    with pytest.raises(ModelError, match=message) as error:
        load_reference(str(tiny_folder), lora=[str(path)])
    assert str(error.value).startswith(f"lora {path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transformer.use_dora": True}, "trained with use_dora True, which fusing does not have"),
        ({"transformer.lora_alpha": "four"}, "lora_alpha 'four' is not a finite number"),
        ({"transformer.alpha_pattern": ["to_q"]}, "its alpha_pattern is not a mapping of patterns to numbers"),
        ({"transformer.alpha_pattern": {"(": 1}}, "its alpha_pattern is not a mapping of patterns to numbers"),
        ([], "its settings are not a JSON object"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: Any, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(GOOD, path, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ModelError, match=message):
        load_reference(str(tiny_folder), lora=[str(path)])


def test_pefts_file_without_its_settings_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    save_file({f"base_model.model.{name}": value for name, value in GOOD.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"its settings, which hold alpha, cannot be read \(.*adapter_config.json: no such file"):
        load_reference(str(tiny_folder), lora=[str(tmp_path / "adapter_model.safetensors")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.safetensors"], "lora .*absent.safetensors: no such file"),
        (["absent.safetensors:0.5"], "lora .*absent.safetensors: no such file"),
        (["{file}:inf"], "lora .*: its scale is not a finite number"),
        (["{file}:much"], "lora .*:much: no such file"),
        (["{folder}"], "not a regular file"),
    ],
)
def test_a_word_that_is_no_adapter_is_refused(words: list[str], message: str, adapter: Path, tiny_folder: Path) -> None:
    words = [word.format(file=adapter, folder=adapter.parent) for word in words]
    with pytest.raises(RecipeError, match=message):
        load_reference(str(tiny_folder), lora=words)


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    """A pickle that would run code, too."""
    folder = save_tiny(tmp_path / "tiny")
    path = tmp_path / "a.bin"
    torch.save({"a": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(ModelError, match="which no tensor needs and which might run code"):
        load_reference(str(folder), lora=[str(path)])
    (tmp_path / "b.safetensors").write_bytes(b"12345678")
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_reference(str(folder), lora=[str(tmp_path / "b.safetensors")])
