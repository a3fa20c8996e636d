"""The options of the command line are those of the recipe."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

import dq_export
from dq_export.cli import export
from dq_export.cli.app import app
from dq_export.cli.options import GROUPS, recipe_options
from dq_export.core.recipe import Recipe, RecipeError


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


@pytest.mark.parametrize(
    ("words", "idle", "user"),
    [
        (["--finish", "10"], "--finish", "--rounding distill"),
        (["--rounding", "gptq", "--distill-pictures", "64"], "--distill-pictures", "--rounding distill"),
        (["--alpha", "0.5"], "--alpha", "--scaling smooth"),
        (["--scaling", "smooth", "--rho", "2"], "--rho", "--scaling dilate"),
        (["--percentile", "99"], "--percentile", "--method percentile"),
        (["--max-lpips", "0.2"], "--max-lpips", "--metric-weights FOLDER"),
        (["--target", "sm89"], "--target", "a plan of TensorRT-RTX, as of --format trt-rtx"),
        (["--format", "trt", "--target", "sm89"], "--target", "a plan of TensorRT-RTX, as of --format trt-rtx"),
        (["--opt-shapes", "timestep:1"], "--opt-shapes", "a plan, as of --format trt"),
    ],
)
def test_a_flag_that_changes_nothing_is_refused(words: list[str], idle: str, user: str, tmp_path: Path) -> None:
    """The user would believe that it has an effect: --max-lpips without the weights of LPIPS limits nothing."""
    result = CliRunner().invoke(app, ["--model", "dit-digits", "-o", str(tmp_path / "out"), *words])
    assert isinstance(result.exception, RecipeError)
    assert str(result.exception) == f"{idle} has no effect without {user}; pass that, too, or leave out {idle}"
    assert not (tmp_path / "out").exists()


def test_so_is_an_argument_of_python(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--finish has no effect without --rounding distill"):
        dq_export.export(model="dit-digits", output_dir=tmp_path / "out", finish=10)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--rounding", "distill", "--finish", "10", "--distill-pictures", "64"],
        ["--scaling", "smooth", "--alpha", "0.5"],
        ["--scaling", "dilate", "--rho", "2", "--method", "percentile", "--percentile", "99"],
        ["--metric-weights", "weights", "--max-lpips", "0.2"],
        ["--format", "trt-rtx", "--target", "sm89", "--opt-shapes", "timestep:1"],
        ["--provider", "tensorrt", "--max-shapes", "timestep:1"],
    ],
)
def test_a_flag_beside_the_option_that_uses_it_is_not(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_group", lambda until: sys.exit(0))
    assert CliRunner().invoke(app, ["--model", "dit-digits", *words]).exit_code == 0


def test_what_a_file_sets_may_have_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each export writes all of its fields into a file, and a flag may turn off what uses them."""
    recipe = Recipe.parse({"model": "dit-digits", "scaling": "smooth", "alpha": 0.3}, "test")
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    monkeypatch.setattr(export, "_group", lambda until: sys.exit(0))
    assert CliRunner().invoke(app, ["--recipe", str(tmp_path / "recipe.yaml"), "--scaling", "none"]).exit_code == 0


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
