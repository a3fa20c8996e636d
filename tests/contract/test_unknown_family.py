"""A family that the product does not know goes through every stage, or is refused before any work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sqnr
from diffusers import EulerDiscreteScheduler
from toy import TOY, Toy, ToyNetwork, ToyPipeline, save_toy

import dq_export
import dq_export.families as families_package
from dq_export.cli.progress import Lines
from dq_export.core.recipe import Recipe
from dq_export.core.tensor_file import load_tensors
from dq_export.families import FAMILIES
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.pipeline import run
from dq_export.stages.recording import HELD_OUT
from dq_export.stages.triton import require_served


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's families and the toy."""
    monkeypatch.setattr(families_package, "FAMILIES", (*FAMILIES, TOY))


def test_a_family_that_the_product_does_not_know_is_exported_whole(tmp_path: Path) -> None:
    """Calibrated, quantized, compared on ONNX Runtime: no stage knows a name of DiT's."""
    folder = save_toy(tmp_path / "toy", width=32)
    recipe = Recipe.parse({"model": str(folder), "steps": 5, "calib_size": 3, "parity_size": 2, "format": "ort"}, "test")
    report = run(recipe, tmp_path / "out", until="verify")
    assert report is not None
    assert report.sampler == "EulerDiscreteScheduler"
    assert report.measured_at == load_reference(str(folder)).timesteps(5)
    assert any(timestep != int(timestep) for timestep in report.measured_at)
    assert report.parity is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    flops = {gemm.name: gemm.flops for gemm in report.audit.gemms}
    assert flops["layers.0.fc1"] == 2 * 6 * 6 * 32 * 64, "of a picture, although its sizes may change"
    recorded = load_tensors(tmp_path / "out" / "parity" / "pytorch.safetensors")[0]["pictures"]
    assert sqnr(recorded, drawn_with_the_engine(folder, tmp_path / "out", recipe)) == pytest.approx(
        report.parity.trajectories[0].sqnr, abs=1e-3
    )


def drawn_with_the_engine(folder: Path, out: Path, recipe: Recipe) -> Any:
    """The compared pictures, by the family's pipeline from the export's own files."""
    pipeline = ToyPipeline(dq_export.load(out), EulerDiscreteScheduler.from_pretrained(folder / "scheduler"))
    saved = load_tensors(out / "conditions.safetensors")[0]
    context, null = saved["context"][: recipe.parity_size], np.repeat(saved["null.context"], recipe.parity_size, axis=0)
    noise = load_reference(str(folder)).noise(recipe.parity_size, recipe.seed + HELD_OUT)
    return pipeline(*map(torch.from_numpy, (context, null, noise)), recipe.steps, TOY.default_guidance).numpy()


class Stubborn(ToyNetwork):
    """What it computes depends on a number that it computes, which no graph can hold."""

    def forward(self, sample: Any, timestep: Any, context: Any, added: Any = None, return_dict: bool = True) -> Any:
        return super().forward(sample if sample.sum() > 0 else -sample, timestep, context, added, return_dict)


class StubbornFamily(Toy):
    """Of the network that cannot be traced."""

    def network_class(self, architecture: str) -> Any:
        return Stubborn


def test_a_network_that_cannot_be_traced_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(families_package, "FAMILIES", (StubbornFamily(),))
    recipe = Recipe.parse({"model": str(save_toy(tmp_path / "toy", depth=2))}, "test")
    with pytest.raises(ModelError, match=r"^PyTorch's exporter makes no graph of Stubborn \(.+\); try another version") as error:
        run(recipe, tmp_path / "out", progress=Lines(quiet=False))
    assert "\n" not in str(error.value)
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text()
    for name, version in re.findall(r"(torch|diffusers) (\d+\.\d+)", str(error.value).split("those of the tests: ")[1]):
        assert f"\n{name}=={version}." in pins
    assert not (tmp_path / "out").exists()
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.endswith("load the network's graph, for its linears and folds"), "what takes the time is said"


def test_a_network_that_the_server_does_not_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--triton: .* do not hold what this network takes: context, strength\. Leave"):
        require_served(Recipe.parse({"model": "toy"}, "test"), load_reference(str(save_toy(tmp_path))))
