"""A missing package is named before any work, with the command that installs it and what needs it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import dq_export
from dq_export.deploy.backend import BackendError
from dq_export.deploy.packages import require_packages


def test_all_missing_packages_are_named_with_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime_ep_openvino", "openvino", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)  # as Python marks a module that cannot be imported
    with pytest.raises(BackendError) as error:
        require_packages(["numpy", "openvino", "onnxruntime_ep_openvino"], "--provider openvino")
    assert str(error.value) == (
        "openvino and onnxruntime-ep-openvino are not installed; pip install 'dq-export[cpu,openvino]', "
        "needed for --provider openvino"
    )
    with pytest.raises(BackendError, match=r"^pillow is not installed; pip install dq-export, needed for pictures$"):
        require_packages(["PIL"], "pictures")
    require_packages(["numpy"], "everything")


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("onnxruntime", {"format": "trt"}, "pip install 'dq-export[cpu]', needed for the stage verify of --format trt"),
        ("onnxruntime", {"format": "onnx"}, "pip install 'dq-export[cpu]', needed for the stage verify of --format onnx"),
        ("onnxruntime", {}, "pip install 'dq-export[cpu]', needed for the stage quantize of --format ort"),
        ("polygraphy", {"format": "trt-rtx"}, "pip install dq-export, needed for the stage reference of --format trt-rtx"),
        ("tensorrt_rtx", {"format": "trt-rtx"}, "pip install 'dq-export[rtx]', needed for --format trt-rtx"),
        ("openvino", {"provider": "openvino"}, "pip install 'dq-export[cpu,openvino]', needed for --provider openvino"),
    ],
)
def test_an_export_asks_for_everything_before_it_works(
    module: str, options: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.get("provider") == "openvino" and importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("needs OpenVINO")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError) as error:
        dq_export.export(model=str(tiny_folder), output_dir=tmp_path / "out", **options)
    assert str(error.value) == f"{module} is not installed; {message}"
    assert not (tmp_path / "out").exists()


def test_a_stage_that_does_not_run_needs_nothing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    dq_export.calibrate(model=str(tiny_folder), output_dir=tmp_path / "out", format="trt", steps=4, calib_size=1)
    assert (tmp_path / "out" / "calibration.safetensors").exists()
