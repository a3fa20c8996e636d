"""An export whose blocks are trained: in one command, or after a finished calibration."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import command_line
import numpy as np
import pytest

import dq_export
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.recipe import RecipeError

QUICK = (
    "--bits",
    "w4a8",
    "--granularity",
    "tensor",
    "--steps",
    "6",
    "--calib-size",
    "4",
    "--parity-size",
    "1",
    "--min-sqnr",
    "10",
)
TRAINING = ("--distill-iterations", "30", "--distill-batch", "8", "--distill-pictures", "4")
BYTES = ("calibration.safetensors", "distilled.safetensors", "model.onnx", "model.onnx.data")


def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
    result = command_line.call(*words)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with --rounding distill, up to its graph."""
    out = tmp_path_factory.mktemp("trained") / "out"
    result = call("quantize", "--model", tiny_folder, *QUICK, *TRAINING, "--rounding", "distill", "-o", out)
    assert "distill   2 blocks, 30 iterations each" in result.stderr
    assert re.search(r"distill   done: [12] of 2 blocks are better, by \d\.\d dB on average", result.stderr)
    return out


def test_a_calibrated_folder_that_is_trained_later_holds_the_same_bytes(tiny_folder: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("calibrate", "--model", tiny_folder, *QUICK, "--rounding", "gptq", "-o", out)
    result = call("distill", out, *TRAINING)
    assert "calibrate done" in result.stderr
    assert "kept from an earlier run" in result.stderr
    for name in BYTES:
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name
    assert not (out / ".training").exists()


def test_the_graph_holds_what_was_trained(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    start, result = (CalibrationResult.load(trained / name) for name in BYTES[:2])
    moved = [float((result.codes[name] != codes).mean()) for name, codes in start.codes.items() if name in result.correction]
    assert len(moved) >= 3 * 2
    assert min(moved) > 0.001
    shown = {item["site"]: item["scales"] for item in report["tables"]}
    for name, plan in result.sites.items():
        np.testing.assert_allclose(shown[name], plan.activation.scale)
        assert np.array_equal(plan.activation.scale, start.sites[name].activation.scale) == (name not in result.correction)


@pytest.mark.slow
def test_training_starts_again_in_a_folder_of_another_unfinished_one(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / ".training").mkdir()
    (out / ".training" / "key").write_text("of another recipe")
    (out / ".training" / "block.0.safetensors").write_bytes(b"stale")
    (out / "distilled.safetensors").unlink()
    call("distill", out)
    assert (out / "distilled.safetensors").read_bytes() == (trained / "distilled.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_correction": True}, "rounding distill with --bias-correction: training decides that itself"),
        ({"calibration": "progressive"}, "rounding distill with --calibration progressive: training decides that itself"),
        ({"exclude": ("blocks",)}, "the rules leave no linear to quantize"),
        ({"distill_iterations": 0}, "distill_iterations = 0: Input should be greater than or equal to 1"),
    ],
    ids=["bias", "progressive", "nothing", "iterations"],
)
def test_what_cannot_be_trained_is_refused_before_any_work(
    options: dict[str, object], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        dq_export.export(model=str(tiny_folder), output_dir=tmp_path / "out", rounding="distill", **options)
    assert not (tmp_path / "out").exists()
