"""The command line to TensorRT and TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from command_line import call

RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
QUICK = ("--steps", "4", "--calib-size", "2", "--min-sqnr", "10")


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtx") / "out"
    result = call("--model", tiny_folder, "--format", "trt-rtx", "-o", out, *QUICK)
    assert result.returncode == 0, result.stderr
    return out


@RTX
def test_a_plan_its_audit_and_the_parity_of_its_graph(exported: Path) -> None:
    report = json.loads((exported / "report.json").read_text())
    assert report["audit"]["coverage"] == 1
    assert {call["stage"] for call in report["parity"]["calls"]} == {"float-onnx", "qdq-onnx"}
    assert report["latency"] is None  # a plan runs on a GPU only
    assert report["engine"] == "TensorRT-RTX"
    assert any(name.startswith("tensorrt-rtx") for name in report["versions"])
    page = (exported / "report.html").read_text()
    assert "Plan not run here: TensorRT-RTX" in page
    assert "by the engine" not in page
    assert (exported / "engine" / "model.plan").stat().st_size > 10_000
    described = json.loads((exported / "engine" / "plan.json").read_text())
    assert described["library"].startswith("tensorrt_rtx 1.")
    assert described["origin"]["dq_export_checkpoint"] == report["digest"]
    replay = call("verify", exported)
    assert replay.returncode == 0, replay.stdout


@RTX
@pytest.mark.slow
def test_a_second_run_keeps_the_plan_and_another_target_builds_it_anew(exported: Path, tiny_folder: Path) -> None:
    same = call("--model", tiny_folder, "--format", "trt-rtx", "-o", exported, *QUICK)
    assert "build     done: kept from an earlier run" in same.stderr
    words = ("--model", tiny_folder, "--format", "trt-rtx", "-o", exported, *QUICK, "--overwrite")
    other = call(*words, "--target", "sm120", "--max-shapes", "hidden_states:4x2x8x8,class_labels:4,timestep:4")
    assert other.returncode == 0, other.stderr
    assert "quantize  done" in other.stderr
    described = json.loads((exported / "engine" / "plan.json").read_text())
    assert described["targets"] == ["sm120"]
    assert described["profiles"]["class_labels"] == [[1], [2], [4]]
    assert call(*words).returncode == 0  # as the other tests found it


@RTX
def test_finish_builds_what_is_not_built(exported: Path) -> None:
    plan = (exported / "engine" / "model.plan").read_bytes()
    for path in (exported / "engine").iterdir():
        path.unlink()
    result = call("finish", exported)
    assert result.returncode == 0, result.stderr
    assert "100.0% of the quantized FLOPs in low precision" in result.stderr
    assert (exported / "engine" / "model.plan").read_bytes() == plan


@RTX
def test_bench_of_a_plan_says_that_it_needs_a_gpu(exported: Path) -> None:
    result = call("bench", exported)
    assert result.returncode == 2
    assert "an engine of TensorRT-RTX runs on an NVIDIA GPU of --target sm89,sm120 only" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_trt_without_tensorrt_does_all_but_the_plan(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("--model", tiny_folder, "--format", "trt", "-o", out, *QUICK)
    assert result.returncode == 5, result.stderr
    assert f"pip install 'dq-export[trt]' && dq-export finish {out}" in result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["parity"]["calls"]
    assert report["audit"] is None
    assert (report["verdict"]["outcome"], report["verdict"]["status"]) == ("unfinished", 5)
    assert re.search(r"verdict +│ unfinished", result.stdout)
    checked = call("check", out / "model.onnx", "--target", "trt")
    assert checked.returncode == 0, checked.stdout
    assert "12 low precision, 2 float, 0 rejected" in checked.stdout
    second = call("finish", out)
    assert second.returncode == 5
    assert "tensorrt is not installed here" in second.stderr


def test_check_fails_where_a_quantized_gemm_runs_in_float(tiny_folder: Path, tmp_path: Path) -> None:
    result = call("quantize", "--model", tiny_folder, "--format", "onnx", "--bins", "per-step", "-o", tmp_path / "out", *QUICK)
    assert result.returncode == 0, result.stderr
    actual = call("check", tmp_path / "out" / "model.onnx", "--target", "trt-rtx", "--json")
    assert actual.returncode == 3
    verdicts = [item["verdict"] for item in json.loads(actual.stdout)]
    assert sorted(set(verdicts)) == ["float"]
    assert len(verdicts) == 14


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing.onnx", "--target", "trt"), "nothing.onnx: no such file; expected an ONNX file"),
        (("x.onnx", "--target", "tensorrt"), "--target 'tensorrt': expected trt, trt-rtx, ort, ort-cuda. Did you mean 'trt'?"),
    ],
)
def test_check_of_nothing_is_an_error(words: tuple[str, ...], message: str) -> None:
    result = call("check", *words)
    assert result.returncode == 2
    assert message in result.stderr
