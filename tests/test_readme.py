"""The README tells the truth about commands, options and files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


def help_of(*words: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "dq_export", *words, "--help"], capture_output=True, text=True, check=True
    ).stdout


def test_the_ci_runs_the_readmes_test_command() -> None:
    (command,) = [line for line in SHELL if "pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_option_and_command_of_the_readme_exists() -> None:
    known = help_of() + help_of("search")
    used = {
        word for line in SHELL if "dq-export --" in line for word in shlex.split(line.split("dq-export ", 1)[1], comments=True)
    }
    options = {word for word in used if word.startswith("-")} | set(re.findall(r"`(--[a-z-]+)", TEXT)) - {"--onnxrt"}
    assert len(options) > 5
    for option in options:
        assert re.search(rf"{option}\b", known), option
    for command in re.findall(r"`(?:dq-export )?(verify|audit|bench|bisect|explain) OUT", TEXT):
        assert re.search(rf"^\W*{command} ", known, re.MULTILINE)


def test_the_python_examples_compile_and_name_what_exists() -> None:
    import dq_export

    examples = [block for kind, block in BLOCKS if kind == "python"]
    assert len(examples) == 2
    for code in examples:
        compile(code, "README.md", "exec")
    for name in re.findall(r"`dq_export\.(\w+)`|dq_export\.(\w+)\(", TEXT):
        assert hasattr(dq_export, name[0] or name[1])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b((?:examples|benchmarks|dq_export)/[\w./]+\.(?:py|json))", TEXT))))
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).is_file()
