"""What this machine can build, run and serve."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from command_line import call

from dq_export import doctor, machine
from dq_export.deploy.child import Exit
from dq_export.doctor import Diagnosis, Library, diagnose


def of_library(modules: tuple[str, ...], capability: str = "", gpu: str = "") -> Diagnosis:
    library = Library(title="it", modules=modules, distributions=("numpy",), purpose="for this", gpu=gpu)
    return doctor._library(library, capability)


def test_the_command_lists_libraries_processor_and_server() -> None:
    result = call("doctor", env={"COLUMNS": "300", "PATH": "/nowhere"})
    assert result.returncode == 0, result.stderr
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert set(rows) >= {"CPU", "NVIDIA GPU", "tritonserver", *(library.title for library in doctor.LIBRARIES)}
    assert f" {metadata.version('onnxruntime')} " in rows["ONNX Runtime"]
    assert "pip" not in rows["ONNX Runtime"]
    assert "NVIDIA's container" in rows["tritonserver"]


def test_a_missing_library_has_the_command_that_adds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    client = {item.part: item for item in diagnose()}["Triton's client"]
    assert (client.state, client.remedy) == ("missing", "pip install 'dq-export[triton]'")


def test_a_library_that_cannot_be_imported_is_reported_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise ImportError('libz.so.9: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(tmp_path)
    library = of_library(("broken_library",))
    assert library.state == "cannot be imported: ImportError: libz.so.9: no such file"
    assert library.remedy == "pip install --force-reinstall --no-deps numpy"


def test_the_option_that_needs_cuda_is_named_where_the_library_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    library = next(item for item in doctor.LIBRARIES if item.title == "ONNX Runtime")
    assert "--provider cuda" not in doctor._library(library, "").purpose  # this one has the CPU provider alone
    monkeypatch.setattr(doctor, "run_child", lambda program, modules, answer: answer({"cuda": True}) or Exit(status=0, reason=""))
    assert doctor._library(library, "sm90").purpose == f"{library.purpose}, also with --provider cuda"


def test_what_needs_a_gpu_is_not_promised_without_one() -> None:
    assert of_library(("numpy",), gpu="runs its plans").purpose == "for this; an NVIDIA GPU runs its plans"
    assert of_library(("numpy",), "sm89", gpu="runs its plans").purpose == "for this; runs its plans"
    assert doctor._gpu("sm86").purpose == "plans with INT8 GEMMs; --target sm86"
    rtx = "plans with INT8 and FP8 GEMMs; --format trt: TensorRT-RTX does not run there"
    assert doctor._gpu("sm90").purpose == rtx  # as its runtime says on an H200
    assert doctor._gpu("sm120").purpose == "plans with INT8 and FP8 GEMMs; --target sm120"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("flags : fpu avx2 avx512_vnni amx_int8 amx_bf16", "fast 8-bit GEMMs: AMX-INT8, AVX512-VNNI; bfloat16: AMX-BF16"),
        ("flags : fpu avx2", "no instructions for 8-bit GEMMs: --bits w8a8 gains little speed"),
        ("Features : fp asimddp i8mm bf16", "fast 8-bit GEMMs: I8MM, dot product; bfloat16: BF16"),
        ("", "its instructions are not known here"),
    ],
)
def test_the_instructions_that_decide_the_speed_are_named(line: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.Path, "read_text", lambda path, encoding: f"model name : a CPU\n{line}\n")
    assert doctor._cpu() == Diagnosis(part="CPU", state="a CPU", purpose=words)
