"""Adapters of Stable Diffusion 3, against diffusers' own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from sd3 import save_sd3

from dq_export.families.source import load_reference

TARGETS = ["to_q", "to_out.0", "add_k_proj", "ff.net.2", "norm1.linear", "proj_out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


def trained(folder: Path) -> Any:
    """diffusers' network with an adapter whose matrices are random."""
    model = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    model.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS))
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn_like(value)
    return model


@pytest.mark.parametrize("alpha", [True, False], ids=["settings in the file", "alpha is rank"])
def test_weights_are_those_that_diffusers_fuses(alpha: bool, folder: Path, tmp_path: Path) -> None:
    model = trained(folder)
    settings = model.peft_config["default"].to_dict() | {"target_modules": TARGETS, "peft_type": "LORA", "task_type": None}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=settings if alpha else None,
    )
    exact = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    exact.load_lora_adapter(tmp_path, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    exact.fuse_lora(lora_scale=0.5)
    exact.unload_lora()
    actual: Any = load_reference(str(folder), lora=[f"{tmp_path / 'pytorch_lora_weights.safetensors'}:0.5"])
    expected, state = exact.state_dict(), actual.model.state_dict()
    changed = [
        name for name, value in load_reference(str(folder)).model.state_dict().items() if not torch.equal(value, state[name])
    ]  # type: ignore[attr-defined]
    assert sorted(changed) == sorted(actual.fused)
    assert len(changed) > 10
    for name in expected.keys() & state.keys():
        torch.testing.assert_close(state[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert set(changed) <= expected.keys()
