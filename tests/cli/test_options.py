"""The options of the command line are those of the recipe."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from dq_export.cli import export
from dq_export.cli.app import app
from dq_export.cli.options import GROUPS, recipe_options
from dq_export.core.recipe import Recipe


def helped(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    return result.stdout


def test_every_field_of_a_recipe_is_an_option_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(Recipe.model_fields) - {"rules", "conditions_sha256", "lora_sha256", "tables_sha256"}, (
        "rules and digests stand in files"
    )
    assert [item.name for item in recipe_options()] == grouped


def test_the_help_has_the_groups_in_80_columns_and_examples_that_are_commands() -> None:
    text = helped()
    for group in (*GROUPS, "Run", "Commands"):
        assert f"─ {group} ─" in text
    examples = re.findall(r"^ +dq-export ((?:--|[a-z]).*?) *$", text, re.MULTILINE)
    assert len(examples) == 5
    for words in examples:
        arguments = [*words.split(), "--help"]
        assert CliRunner().invoke(app, arguments).exit_code == 0, words


def test_a_description_stands_in_the_recipe_alone_with_choices_and_default() -> None:
    text = re.sub(r"[\s│]+", " ", helped())
    assert "how a scale follows from the values seen: minmax, percentile, mse (default minmax)" in text
    assert "inputs that share a weight scale; 0: all (default by bits)" in text
    assert "seed of noise and conditions (default 0)" in text
    for choice in get_args(Recipe.model_fields["bits"].annotation):
        assert choice in text


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--bits", "W4A8", "--bins", "7"], {"bits": "w4a8", "bins": 7}),
        (["--bins", "per-step", "--alpha", "0.25"], {"bins": "per-step", "alpha": 0.25}),
        (["--no-shift", "--bias-correction"], {"shift": False, "bias_correction": True}),
        (["--shift", "--triton", "--seed", "0"], {"shift": True, "triton": True, "seed": 0}),
        (["--text-encoder-bits", "8"], {"text_encoder_bits": 8}),
        (["--min-shapes", "timestep:1", "--group-size", "0"], {"min_shapes": "timestep:1", "group_size": 0}),
        (["-m", "other", "--revision", "v2", "--format", "TRT"], {"model": "other", "revision": "v2", "format": "trt"}),
    ],
)
def test_flags_become_the_recipes_values(words: list[str], values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the parsed recipe, which fills in the other keys."""
    options: list[dict[str, Any]] = []

    def remember(path: object, flags: dict[str, Any]) -> Recipe:
        options.append(flags)
        raise SystemExit(0)

    monkeypatch.setattr(export, "recipe_of", remember)
    CliRunner().invoke(app, ["--model", "m", *words])
    assert options == [{"model": "m", **values}]


COMMANDS = [item.name or getattr(item.callback, "__name__", "") for item in app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_fits(command: str) -> None:
    assert re.search(rf"Usage: \S+ {command} ", helped(command))


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"dq-export {metadata.version('dq-export')}\n")


def test_the_shell_completes_options_and_their_choices() -> None:
    def completed(text: str) -> str:
        words = {"_DQ_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": text, "COMP_CWORD": str(len(text.split(" ")) - 1)}
        return CliRunner().invoke(app, [], prog_name="dq-export", env=words).stdout

    assert completed("dq-export --bits ").split() == list(get_args(Recipe.model_fields["bits"].annotation))
    assert "--calib-size" in completed("dq-export --calib")
