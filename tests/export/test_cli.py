"""The command line as a user meets it: processes, statuses, messages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import pytest
from conftest import save_tiny

QUICK = ("--steps", "4", "--calib-size", "2", "--min-sqnr", "10")
BYTES = (
    "calibration.safetensors",
    "model.onnx",
    "model.onnx.data",
    "parity/inputs.json",
    "parity/outputs.json",
    "engine/session.json",
)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "dq_export", *map(str, words)]


def call(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return command_line.call(*words, cwd=cwd, env={**os.environ, "COLUMNS": "120"})


def export(model: Path, out: Path, *words: str) -> list[str | Path]:
    return ["--model", model, *QUICK, "-o", out, *words]


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in BYTES}


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    result = call(*export(tiny_folder, out))
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "report.json").read_text())["command"].startswith("dq-export --model ")
    for stage in ("load", "float", "calibrate", "reference", "quantize", "build", "audit", "verify", "bench"):
        assert f"{stage:9} done" in result.stderr
    for word in (
        "passed",
        "worst call",
        "of all GEMM FLOPs",
        "100.0%",
        "SQNR engine",
        "size",
        "latency",
        "not quantized",
        "embedders",
    ):
        assert word in result.stdout
    return out


def test_help_fits_and_names_every_option() -> None:
    result = call("--help")
    from dq_export.core.recipe import Recipe

    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 120
    for name in set(Recipe.model_fields) - {
        "rules",
        "conditions_sha256",
        "lora_sha256",
        "tables_sha256",
    }:  # which only recipe files have
        assert f"--{name.replace('_', '-')}" in result.stdout
    for name in ("calibrate", "quantize", "build", "verify", "audit", "bench", "explain", "--recipe", "--exclude", "--json"):
        assert name in result.stdout


def test_help_loads_neither_torch_nor_a_runtime() -> None:
    code = (
        "import sys; from dq_export.cli import main\nsys.argv = ['dq-export', '--help']\ntry: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'onnxruntime', 'onnx', 'onnx_ir', 'polygraphy'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modle", "dit"], "No such option: --modle (Possible options: --method, --model)"),
        (["calibrat"], "Did you mean 'calibrate'?"),
        (["--model", "dit-digit"], "Did you mean 'dit-digits'?"),
        (["--model", "missing/folder/x"], "no such model or folder"),
        (["--model", "dit"], "or pass a local folder"),
        (["--model", "dit-digits", "--format", "tensorrt"], "format = 'tensorrt': expected 'onnx', 'ort', 'trt' or 'trt-rtx'"),
        (
            ["--model", "dit-digits", "--bits", "w8a9"],
            "expected 'w8a8', 'w8a16', 'w6a6', 'w4a8', 'w4a16', 'w4a4' or 'fp8'. Did you mean 'w8a8'?",
        ),
        (["--model", "dit-digits", "--recipe", "nothing.yaml"], "recipe nothing.yaml: no such file"),
        (["--steps", "5"], "--model is missing"),
        (["--model", "dit-digits", "--steps", "five"], "Invalid value for '--steps'"),
        (["audit", "nothing"], "is it the output folder of a finished export?"),
        (["verify", "nothing"], "is it the output folder of a finished export?"),
    ],
)
def test_bad_requests_get_one_clear_message(words: list[str], message: str, tmp_path: Path) -> None:
    result = call(*words, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr.replace("\n", " ").replace("│", "")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bits_may_be_written_in_capitals_and_a_recipe_key_must_exist(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: minmax\nscalling: auto\n")
    result = call(*export(tiny_folder, tmp_path / "out", "--bits", "W8A8", "--recipe", str(tmp_path / "r.yaml")))
    assert result.returncode == 2
    assert "unknown key 'scalling'. Did you mean 'scaling'?" in result.stderr
    assert len(result.stderr.splitlines()) == 1, "the model comes from the flag, and W8A8 is w8a8"


@pytest.mark.parametrize(
    ("pattern", "message"), [("nothing", "matches none of 20 linears"), ("attn1|ff", "leave no linear to quantize")]
)
def test_an_exclude_without_effect_or_with_too_much(tiny_folder: Path, tmp_path: Path, pattern: str, message: str) -> None:
    result = call(*export(tiny_folder, tmp_path / "out", "--exclude", pattern))
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_activation_that_is_zero_is_an_error_that_keeps_what_was_done(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "model")
    path = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    for part in ("weight", "bias"):
        tensors[f"transformer_blocks.0.attn1.to_v.{part}"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    result = call(*export(folder, tmp_path / "out"))
    assert result.returncode == 1
    assert "'transformer_blocks.0.attn1.to_out.0' is zero at every timestep" in result.stderr
    assert (tmp_path / "out" / "float" / "model.onnx").exists()
    second = call(*export(folder, tmp_path / "out", "--exclude", r"0\.attn1\.to_out", "--overwrite"))
    assert second.returncode == 0, second.stderr
    assert re.search(r"float     done: 0\.\d MB, kept from an earlier run", second.stderr)


def test_another_runs_folder_and_foreign_files_are_left_alone(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    before = digests(finished)
    result = call(*export(tiny_folder, finished, "--scaling", "none"))
    assert result.returncode == 2
    assert "(scaling: 'auto' -> 'none')" in result.stderr
    assert digests(finished) == before
    (tmp_path / "thesis.txt").write_text("x")
    result = call(*export(tiny_folder, tmp_path))
    assert result.returncode == 2
    assert "files of something else (thesis.txt" in result.stderr


def test_too_far_from_pytorch_is_status_4_and_in_float_status_3(tiny_folder: Path, finished: Path, tmp_path: Path) -> None:
    result = call("--model", tiny_folder, *QUICK[:4], "--min-sqnr", "150", "-o", tmp_path / "out")
    assert result.returncode == 4
    assert "required 150.0 dB" in result.stderr
    assert "Try --granularity token, --rounding gptq" in result.stderr
    assert "--scaling auto" not in result.stderr, "it was used"
    assert re.search(r"verdict +│ FAILED", result.stdout)
    assert f"report: {tmp_path / 'out' / 'report.html'}" in result.stdout.replace("\n", "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["verdict"]["outcome"], report["verdict"]["status"]) == ("failed", 4)
    assert report["verdict"]["worst"] == min(report["parity"]["calls"][1:], key=lambda item: item["sqnr"])
    assert "verdict failed" in (tmp_path / "out" / "report.html").read_text()
    assert call("verify", tmp_path / "out").returncode == 4, "what failed does not pass when it is replayed"
    import onnx_ir as ir

    model = ir.load(tmp_path / "out" / "model.onnx")
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        dequantize = next(iter(node.outputs[0].uses()))[0]
        for user, index in list(dequantize.outputs[0].uses()):
            user.replace_input_with(index, node.inputs[0])
    ir.save(model, tmp_path / "out" / "model.onnx")
    result = call("audit", tmp_path / "out")
    assert result.returncode == 3
    assert "no DequantizeLinear" in result.stdout


def test_a_finished_folder_answers(finished: Path) -> None:
    audit = call("audit", finished, "--json")
    assert audit.returncode == 0
    assert json.loads(audit.stdout)["coverage"] == 1
    assert call("verify", finished).returncode == 0
    bench = call("bench", finished, "--json")
    assert json.loads(bench.stdout)["ratio"] > 0
    explained = call("explain", finished, "transformer_blocks.0.attn1.to_k").stdout
    assert "MatMulIntegerToFloat" in explained
    assert "transformer_blocks.0.attn1.to_q" in explained
    assert "Did you mean" in call("explain", finished, "transformer_blocks.0.attn1.to_kk").stderr


def test_json_is_the_report_alone(finished: Path, tiny_folder: Path) -> None:
    result = call(*export(tiny_folder, finished, "--json"))
    assert result.returncode == 0
    assert json.loads(result.stdout) == json.loads((finished / "report.json").read_text())
    assert result.stderr == ""


def interrupt(words: list[str | Path], stage: str, number: signal.Signals) -> tuple[int, str]:
    """Start a run, send a signal as soon as it says that `stage` starts; its status and what it said."""
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    text = ""
    for line in process.stderr:
        text += line
        if line.startswith(f"{stage} "):
            time.sleep(0.05)  # into the stage
            process.send_signal(number)
            break
    text += process.stderr.read()
    process.stderr.close()
    return process.wait(), text


STAGES = (("load", "float", "calibrate", "build"), ("float", "calibrate", "reference", "quantize", "build", "verify"))


@pytest.mark.parametrize(("interrupted", "killed"), [(("float",), ("calibrate",)), pytest.param(*STAGES, marks=pytest.mark.slow)])
def test_interrupted_or_killed_in_a_stage_the_same_command_gives_the_same_bytes(
    interrupted: tuple[str, ...], killed: tuple[str, ...], tiny_folder: Path, finished: Path, tmp_path: Path
) -> None:
    words = export(tiny_folder, tmp_path / "out")
    for stage in interrupted:
        status, text = interrupt(words, stage, signal.SIGINT)
        assert status == 130, text
        assert "interrupted; the same command continues" in text
        assert "Traceback" not in text
    for stage in killed:
        status, text = interrupt(words, stage, signal.SIGKILL)
        assert status == -signal.SIGKILL, f"not killed in {stage}: {text}"
    result = call(*words)
    assert result.returncode == 0, result.stderr
    assert "calibrate done" in result.stderr
    assert "kept from an earlier run" in result.stderr
    assert digests(tmp_path / "out") == digests(finished)
    assert not (tmp_path / "out" / ".partial").exists()


@pytest.mark.slow  # of another stage than tests/export/test_robustness.py, which fills a real file system
@pytest.mark.parametrize("limit", [100_000, 285_000], ids=["in-float", "in-the-graph"])
def test_a_full_disk_is_reported_and_loses_nothing(limit: int, tiny_folder: Path, finished: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for a full disk: the same error class from the same write calls."""
    words = export(tiny_folder, tmp_path / "out")
    result = subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1
    assert "no space left" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / ".partial").exists()
    assert call(*words).returncode == 0
    assert digests(tmp_path / "out") == digests(finished)
