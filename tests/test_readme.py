"""The README is short, and its commands work in order, as typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command_line import call
from typer.testing import CliRunner

import dq_export
from dq_export.cli import export
from dq_export.cli.app import app
from dq_export.core.recipe import Recipe

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
NEEDS = {"cpu": "dq-export", "text": "pixart", "rtx": "trt-rtx", "triton": "triton"}
"""By extra, the word of a command that needs it."""


def blocks(text: str, kind: str) -> list[str]:
    """The contents of a page's fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words behind `dq-export` of every command of a page's shell blocks."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r" && | ; ", line)]
    matches = [re.match(r"(?:\S*/)?(?:torchrun .* -m dq_export|dq-export) (.*)", part) for part in parts]
    return [shlex.split(match[1], comments=True) for match in matches if match]


def judge(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the command line does not take the words, or a recipe does not take their values."""
    parsed = CliRunner().invoke(app, [*words, "--help"])
    assert parsed.exit_code == 0, f"dq-export {shlex.join(words)}: {parsed.output}"
    if not words[0].startswith("-"):
        return
    commands = []

    def parse(path: Path | None, flags: dict[str, object]) -> Recipe:
        values = {key: value for key, value in flags.items() if key != "prompts"}
        commands.append(Recipe.parse({"model": "of a recipe", **values}, shlex.join(words)))
        raise SystemExit(0)

    monkeypatch.setattr(export, "recipe_of", parse)
    CliRunner().invoke(app, words, catch_exceptions=False)
    assert len(commands) == 1, words


def test_it_takes_five_minutes() -> None:
    assert len(TEXT.splitlines()) <= 150
    assert len(TEXT.split()) < 1200


def test_the_ci_runs_the_readmes_test_command() -> None:
    (command,) = [line for block in blocks(TEXT, "sh") for line in block.splitlines() if "pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("words", commands(TEXT), ids=shlex.join)
def test_every_command_is_valid(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    judge(words, monkeypatch)


def test_each_command_writes_a_folder_of_its_own_and_reads_what_an_earlier_one_wrote() -> None:
    written: list[str] = []
    for words in commands(TEXT):
        if "-o" in words:
            folder = words[words.index("-o") + 1]
            assert folder not in written, words
            written.append(folder)
        else:
            paths = [word for word in words[1:] if "/" in word or word.startswith("out")]
            assert [path.split("/")[0] in written for path in paths] == [True], words
    assert len(written) == 4


def test_every_package_that_an_example_needs_is_installed_before_it() -> None:
    installed: set[str] = set()
    for line in [line for block in blocks(TEXT, "sh") for line in block.splitlines()]:
        for extras in re.findall(r'"\.\[([\w,]+)\]"', line):
            installed |= set(extras.split(","))
        if "dq-export" in line:
            needed = {extra for extra, word in NEEDS.items() if word in line}
            assert needed <= installed, line


@pytest.mark.slow
def test_the_commands_work_in_order_in_one_folder(tmp_path: Path) -> None:
    for words in commands(TEXT):
        result = call(*words, cwd=tmp_path)
        assert result.returncode == 0, f"dq-export {shlex.join(words)}: {result.stdout}{result.stderr}"
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out-triton" / "triton" / "README.md").exists()


def test_the_python_examples_compile_and_name_what_exists() -> None:
    (code,) = blocks(TEXT, "python")
    compile(code, "README.md", "exec")
    for name in re.findall(r"dq_export\.(\w+)\(", TEXT):
        assert hasattr(dq_export, name)


def test_the_picture_is_one_of_an_export() -> None:
    """PyTorch, the engine and their difference, of ten pictures."""
    from PIL import Image

    (name,) = re.findall(r"!\[[^]]*\]\(([\w/.]+)\)", TEXT)
    with Image.open(ROOT / name) as picture:
        assert picture.size == (720, 216)
