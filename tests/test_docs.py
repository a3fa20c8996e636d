"""The pages name options, files, methods, keys, formats and messages that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, get_args

import measured
import pytest
import yaml
from test_readme import blocks, commands, judge
from typer.testing import CliRunner

import dq_export
from dq_export.cli.app import app
from dq_export.cli.options import recipe_options
from dq_export.core.artifacts import FORMAT
from dq_export.core.recipe import Recipe
from dq_export.report.report import Report

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TOP = ("dq_export", "calibration", "passes", "deploy")
OF_OTHERS = {"--onnxrt", "--load-inputs", "--strict", "--gpus", "--dq-engine"}
"""Options of polygraphy, mkdocs, docker, and of pytest with the product's plug-in."""


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@cache
def help_texts() -> str:
    """The help of every command."""
    names = [item.name or getattr(item.callback, "__name__", "") for item in app.registered_commands]
    return "".join(CliRunner().invoke(app, [*words, "--help"]).stdout for words in ([], *([name] for name in names)))


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_every_option_and_file_of_a_page_exists(path: Path) -> None:
    text = path.read_text()
    # The options of the scripts in examples/ and benchmarks/ are not those of dq-export.
    scripts = "".join(file.read_text() for folder in ("examples", "benchmarks") for file in (ROOT / folder).glob("*.py"))
    for option in set(re.findall(r"`(?:[\w-]+ )*(--[a-z-]+)", text)) - OF_OTHERS:
        assert re.search(rf"{option}\b", help_texts()) or f'"{option}"' in scripts, option
    for name in set(re.findall(r"\b((?:examples|benchmarks|calibration|dq_export)/[\w./]+\.(?:py|json))", text)):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_every_command_in_a_sentence_exists(path: Path) -> None:
    for command in re.findall(r"`dq-export ([a-z-]+)\b(?! \d)|`([a-z]+) OUT", path.read_text()):
        assert re.search(rf"^\W*{command[0] or command[1]} ", help_texts(), re.MULTILINE), command


CASES = [(path.stem, words) for path in PAGES for words in commands(path.read_text())]


@pytest.mark.parametrize(("stem", "words"), CASES, ids=[f"{stem}: {shlex.join(words)}" for stem, words in CASES])
def test_every_command_is_valid(stem: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    judge(words, monkeypatch)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_python_examples_compile_and_name_what_exists(path: Path) -> None:
    text = path.read_text()
    for code in blocks(text, "python"):
        compile(code, str(path), "exec")
    for name in re.findall(r"`dq_export\.(\w+)`|dq_export\.(\w+)\(", text):
        assert hasattr(dq_export, name[0] or name[1])


def test_the_tables_of_what_was_measured_are_those_of_the_result_files() -> None:
    text = page("measured")
    assert measured.updated(text) == text, "stale: run python benchmarks/measured.py"
    assert sorted(measured.tables_of(text)) == sorted(path.stem for path in measured.RESULTS.glob("*.json"))
    assert "|---" not in measured.BLOCK.sub("", text), "a table without a result file"


@pytest.mark.parametrize("path", sorted(measured.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_states_its_date_and_command(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    date.fromisoformat(result["date"] or result["since"])
    for name in re.findall(r"benchmarks/\w+\.py", result["command"]):
        assert (ROOT / name).is_file(), name
    assert result["command"].startswith(("python benchmarks/", "dq-export "))
    assert result["machine"]


def test_every_page_is_in_the_sites_navigation() -> None:
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [name for section in sections for names in section.values() for name in names]
    assert sorted(listed) == [path.name for path in PAGES]


def test_the_page_of_methods_takes_words_that_options_have() -> None:
    used: dict[str, set[str]] = {}
    for option, word in re.findall(r"--(scaling|rounding|granularity|calibration|bits) ([\w-]+)", page("methods")):
        used.setdefault(option, set()).add(word)
    assert len(used) == 5
    for option, words in used.items():
        assert words <= set(_words(Recipe.model_fields[option].annotation)), option


def _words(annotation: Any) -> list[str]:
    return [word for part in (annotation, *get_args(annotation)) for word in get_args(part) or (part,) if isinstance(word, str)]


def test_the_page_about_recipes_lists_every_key() -> None:
    lines = ["| key | what it is |", "|---|---|"]
    for item in recipe_options():
        (option,) = [part for part in item.annotation.__metadata__ if getattr(part, "help", None)]
        text = option.help.replace("|", "\\|")
        lines.append(f"| `{item.name}` | {text} |")
    table = "\n".join(lines)
    assert table in page("recipes"), f"docs/recipes.md, Keys; the table is:\n{table}"
    for name in set(Recipe.model_fields) - {item.name for item in recipe_options()}:
        assert f"`{name}`" in page("recipes")


def test_the_rules_of_the_page_about_recipes_are_rules() -> None:
    (text,) = blocks(page("recipes"), "yaml")
    rules = Recipe.parse({"model": "dit-digits", **yaml.safe_load(text)}, "recipes.md").rules
    assert rules is not None
    assert [rule.action for rule in rules] == ["w8a8", "bits", "bits", "float"]


def test_the_page_about_formats_names_todays() -> None:
    assert f"`{FORMAT}`" in page("formats")
    assert f"Its key `version` is {Report.model_fields['version'].default}." in page("formats")


@cache
def messages() -> str:
    """Every text of the product, one per line, with … for each inserted value."""
    texts = []
    for path in [path for top in TOP for path in sorted((ROOT / top).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


TROUBLES = re.findall(r"^### `(.+)`$", page("troubleshooting"), re.MULTILINE)


@pytest.mark.parametrize("message", TROUBLES)
def test_every_message_of_the_page_about_troubles_is_one(message: str) -> None:
    assert len(message) > 15
    assert re.search(re.escape(message).replace("…", "[^\n]*?"), messages())


def test_the_page_about_troubles_has_messages() -> None:
    assert len(TROUBLES) > 30
