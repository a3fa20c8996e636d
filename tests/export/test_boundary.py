"""What comes from outside and cannot be used ends in one line on the terminal, with a status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_line
import pytest

from dq_export.cli.errors import LINE_LENGTH, LINES, print_error, reason_of


def call(*words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    result = command_line.call(*words, timeout=120, **more)
    assert "Traceback" not in result.stderr
    return result


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: dit-digits\nrules:\n- {match: '(\\w+\\.?)+!', action: w8a8}", "matches none of"),
        ("model: dit-digits\nrules:\n- {match: 'a{4294967295}', action: w8a8}", "repeats more than 1000 times"),
        ("model: dit-digits\nrules:\n- {match: '(?=a)', action: w8a8}", "is not a regular expression of RE2's syntax"),
        ("model: dit-digits\nrules: [a, b]", "rules.0"),
        ("model: [dit-digits]", "model = ['dit-digits']"),
        ("1: 2", "key 1 is not an option"),
        ("- model", "expected a mapping of options, found list"),
        ("model: dit-digits\nseed: 2001-99-99", "seed = '2001-99-99'"),
        ("model: dit-digits\n" + "\n".join(f"k{i}: 1" for i in range(500)), "490 more"),
        ("model: dit-digits\n'\\e[2J': 1", "unknown key"),
        ('model: dit-digits\n"\\e[2J": 1', "unknown key '\\x1b[2J'"),
        ("model: " + "x" * 100_000, "model = 'xxx"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_by_name(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    result = call("--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert result.returncode == 2
    assert reason in result.stderr
    assert len(result.stderr) < 12_000
    assert "\x1b" not in result.stderr
    assert not (tmp_path / "out" / "stages.json").exists()


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "file/out"])
def test_a_folder_that_cannot_be_made_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("--model", "dit-digits", "--quiet", "-o", name, cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert result.stderr.startswith("error: ")
    assert name[:20] in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "link in a circle", "not UTF-8", "missing"])
def test_a_recipe_that_is_no_file_of_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "not UTF-8":
        path.write_bytes(b"model: \xff")
    elif kind != "missing":
        path.symlink_to(path)
    result = call("--recipe", path, "-o", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: recipe {path}: ")
    assert result.stderr.count("\n") == 1


def test_an_error_of_the_system_becomes_a_reason() -> None:
    assert reason_of(OSError(36, "File name too long", "xxx")) == "xxx: File name too long"
    assert "no space left for f" in reason_of(OSError(28, "No space left on device", "f"))
    assert "'onnxruntime' is missing" in reason_of(ImportError("no", name="onnxruntime"))
    assert "cannot be imported: circular" in reason_of(ImportError("circular"))
    assert "--max-memory" in reason_of(MemoryError())


def test_an_error_cannot_steer_or_flood_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("a \x1b[2J\n" + "x" * 100_000 + "\n" * 200)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: a \\x1b[2J"
    assert len(lines[1]) == LINE_LENGTH - 1
    assert len(lines) == LINES + 1


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    words = f"{sys.executable} -m dq_export --help"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | true"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
