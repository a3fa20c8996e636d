"""The command line to a Triton repository."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import command_line
import pytest
from conftest import export_untimed

from dq_export.core.recipe import Recipe
from dq_export.deploy.triton.check import check_repository

QUICK = ("--steps", "4", "--calib-size", "2", "--min-sqnr", "10")


def call(*words: object) -> subprocess.CompletedProcess[str]:
    return command_line.call(*words, env={**os.environ, "COLUMNS": "200"})


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


Served = tuple[Path, dict[str, str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Exported with a timestep for each sample and without a repository, which `triton` then adds: before, and its run."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    options = {"steps": 4, "calib_size": 2, "min_sqnr": 10}  # as `QUICK`
    export_untimed(tiny_folder, out, timesteps="per-sample", **options)
    before = digests(out)
    result = call("triton", out)
    assert result.returncode == 0, result.stderr
    return out, before, result


@pytest.fixture
def mixed(served: Served) -> Path:
    return served[0]


def test_a_finished_export_gets_its_repository_and_keeps_all_else(served: Served) -> None:
    mixed, before, done = served
    assert "quantize  done" in done.stderr
    assert done.stderr.count("kept from an earlier run") == 7
    assert str(mixed / "triton" / "README.md") in done.stdout
    after = digests(mixed)
    assert {name for name in before if before[name] != after[name]} <= {
        "recipe.yaml",
        "stages.json",
        "report.json",
        "report.html",
    }
    assert Recipe.load(mixed / "recipe.yaml").triton
    first = digests(mixed / "triton")
    assert {"README.md", "client.py", "denoiser/1/model.onnx", "pipeline/1/schedules.npy"} <= first.keys()
    assert not any("__pycache__" in name for name in first)
    shutil.rmtree(mixed / "triton")
    second = call("triton", mixed)
    assert second.stderr.count("kept from an earlier run") == 7
    assert digests(mixed / "triton") == first


def test_the_readme_lists_the_repositorys_inputs(mixed: Path) -> None:
    text = (mixed / "triton" / "README.md").read_text()
    for words in (
        "hidden_states` FP32[n, 2, 8, 8]",
        "| 0 to 4, n up to 8 |",
        "| 4 | 1 to 100 |",
        "`ddim`, `dpmsolver++`, `euler`",
        "$PWD:/models",
    ):
        assert words in text
    assert 'name: "images"' not in (mixed / "triton" / "pipeline" / "config.pbtxt").read_text()  # two channels are no picture


def test_one_timestep_a_batch_cannot_be_served(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("build", "--model", tiny_folder, "-o", out, *QUICK).returncode == 0
    before = digests(out)
    result = call("triton", out)
    assert result.returncode == 2
    assert f"dq-export --recipe {out / 'recipe.yaml'} --timesteps per-sample --triton -o {out}-triton" in result.stderr
    assert digests(out) == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--timesteps", "shared"), "--triton needs --timesteps per-sample"),
        (("--format", "onnx"), "no backend of Triton's serves --format onnx"),
        (("--format", "trt-rtx"), "no backend of Triton's serves --format trt-rtx"),
        (("--text-encoder-bits", "8"), "--text-encoder-bits 8: this network draws no prompts, so its server has no text encoder"),
    ],
)
def test_a_network_that_cannot_be_served_is_refused_before_any_work(
    tiny_folder: Path, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    result = call("--model", tiny_folder, "-o", tmp_path / "out", "--triton", *words, *QUICK)
    assert result.returncode == 2
    assert reason in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
@pytest.mark.slow
def test_for_tensorrt_all_but_the_plan_is_there(tiny_folder: Path, tmp_path: Path) -> None:
    shapes = "hidden_states:8x2x8x8,class_labels:8,timestep:8"
    result = call("--model", tiny_folder, "--format", "trt", "--triton", "--max-shapes", shapes, "-o", tmp_path / "out", *QUICK)
    assert result.returncode == 5, result.stderr
    assert "dq-export finish" in result.stderr
    repository = tmp_path / "out" / "triton"
    (fault,) = check_repository(repository)
    assert fault.problem == "1/model.plan is missing or empty"
    config = (repository / "denoiser" / "config.pbtxt").read_text()
    assert "KIND_GPU" in config
    assert "max_batch_size: 8" in config
    assert "dq-export finish OUT" in (repository / "README.md").read_text()
    assert "--gpus all" in (repository / "README.md").read_text()


def test_check_lists_faults_and_sets_the_status(mixed: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(mixed / "triton", repository)
    result = call("triton", "--check", repository)
    assert (result.returncode, result.stdout) == (0, "0 errors, 0 warnings\n")
    (repository / "denoiser" / "1" / "model.onnx.data").unlink()
    result = call("triton", "--check", repository)
    assert result.returncode == 1
    assert "external data 'model.onnx.data' is missing" in result.stdout
    assert "1 errors, 0 warnings" in result.stdout
    assert call("triton", "--check", tmp_path / "nothing").returncode == 1


def test_a_folder_that_is_not_an_export_is_refused(tmp_path: Path) -> None:
    result = call("triton", tmp_path)
    assert result.returncode == 2
    assert "is it the output folder of a finished export?" in result.stderr


def test_without_the_client_library_the_error_has_the_pip_command(tiny_folder: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['tritonclient'] = None; from dq_export.cli import main; sys.argv[1:] = sys.argv[1:]; main()"
    words = ["--model", tiny_folder, "--triton", "-o", tmp_path / "out", *QUICK]
    result = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'dq-export[triton]'" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_engine_for_one_row_cannot_draw_guided_pictures(tiny_folder: Path, tmp_path: Path) -> None:
    shapes = "hidden_states:1x2x8x8,class_labels:1,timestep:1"
    words = ("--model", tiny_folder, "--format", "trt", "--triton", "--max-shapes", shapes, "-o", tmp_path / "out", *QUICK)
    result = call(*words)
    assert result.returncode == 1
    assert "a guided picture takes two rows of a call, --max-shapes allows one" in result.stderr
