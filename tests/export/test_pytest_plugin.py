"""The proof in a CI of others: pytest's option and fixture, and the workflow that replays the recorded calls."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TESTS = """
def test_engine_keeps_parity(dq_engine):
    dq_engine.assert_parity()

def test_engine_keeps_150_dB(dq_engine):
    dq_engine.assert_parity(150)
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A folder with a test file, and an installed package with the entry points of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["pytest11"]
    package = tmp_path / "site" / "installed-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "entry_points.txt").write_text(f"[pytest11]{lines}\n")
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    (tmp_path / "test_user.py").write_text(TESTS)
    return tmp_path


def run_pytest(user: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(user / "site"), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-rs", *words]
    return subprocess.run(command, cwd=user, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)


def test_a_users_tests_judge_an_engine(user: Path, tiny_exported: Path) -> None:
    result = run_pytest(user, "--dq-engine", str(tiny_exported))
    assert "1 failed, 1 passed" in result.stdout, result.stdout + result.stderr
    assert f"AssertionError: {tiny_exported}: a call keeps " in result.stdout
    assert "required 150.0 dB (min_sqnr of the test)" in result.stdout
    assert "pytest_plugin.py" not in result.stdout, "the traceback ends in the user's test"


def test_without_the_option_tests_of_an_engine_are_skipped(user: Path) -> None:
    result = run_pytest(user)
    assert result.returncode == 0
    assert "needs --dq-engine OUT, the output folder of a finished export" in result.stdout
    assert "2 skipped" in result.stdout


def test_a_folder_without_an_export_is_refused_before_any_test(user: Path) -> None:
    result = run_pytest(user, "--dq-engine", "site")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.strip() == (
        "ERROR: --dq-engine site: no recipe.yaml, report.json, model.onnx; is it the output folder of a finished export?"
    )


def test_the_workflow_replays_the_recorded_calls(tiny_exported: Path, tmp_path: Path) -> None:
    """The step of `.github/workflows/parity.yml`, as it stands there: a whole export passes, and another graph fails."""
    (job,) = yaml.safe_load((ROOT / ".github/workflows/parity.yml").read_text())["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if step.get("name") == "replay"]
    shutil.copytree(tiny_exported, tmp_path / "out")
    environment = {**os.environ, "FOLDER": "out", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def replay() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    passed = replay()
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "PASSED" in passed.stdout
    weights = tmp_path / "out" / "model.onnx.data"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    assert replay().returncode == 1
