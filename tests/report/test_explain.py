"""`dq-export explain` on a finished folder, and the report's record of places that passes left alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dq_export.cli.app import app
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.recipe import Recipe
from dq_export.output_folder import OutputError
from dq_export.pipeline import run
from dq_export.preparation import Options
from dq_export.report.report import Report

Q, OUT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_out.0"
QUICK: dict[str, Any] = {"calib_size": 2, "steps": 4, "parity_size": 1, "min_sqnr": -200}


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`auto` chose the scalings; one linear is excluded."""
    out = tmp_path_factory.mktemp("explained") / "out"
    recipe = Recipe.parse({"model": str(tiny_folder), "timesteps": "per-sample", **QUICK}, "test")
    run(recipe, out, Options(exclude=(re.escape(OUT) + "$",)), until="audit")
    return out


def explain(*words: object) -> Any:
    return CliRunner().invoke(app, ["explain", *map(str, words)], env={"COLUMNS": "80"})


def test_the_candidates_that_auto_measured_are_kept_and_listed(finished: Path) -> None:
    plan = CalibrationResult.load(finished / "calibration.safetensors").sites[Q]
    tried = plan.alternatives
    assert {"none", "dilate(1)", "smooth(0.5)", "balance", "equalize"} <= set(tried)
    assert tried[plan.method] == plan.error == min(tried.values())
    report = Report.model_validate_json((finished / "report.json").read_bytes())
    assert next(table.alternatives for table in report.tables if table.site == Q) == tried
    lines = explain(finished, Q).stdout
    best = f"{plan.method} {plan.error:.2e}"
    assert re.search(rf"measured\W+{re.escape(best)}, ", lines), "the least error first"
    assert re.search(r"none\s+\d\.\d\de-", lines)


def test_a_recipe_with_one_scaling_has_no_alternatives(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse({"model": str(tiny_folder), "scaling": "smooth", **QUICK}, "test")
    run(recipe, tmp_path / "out", until="calibrate")
    plans = CalibrationResult.load(tmp_path / "out" / "calibration.safetensors").sites.values()
    assert [dict(plan.alternatives) for plan in plans] == [{}] * 8


def test_without_a_name_it_lists_every_linear(finished: Path) -> None:
    result = explain(finished)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    report = Report.model_validate_json((finished / "report.json").read_bytes())
    blocks = re.split(r"\n(?! )", result.stdout.rstrip())
    assert [block.splitlines()[0] for block in blocks] == [linear.name for linear in report.linears]
    for linear, block in zip(report.linears, blocks, strict=True):
        _, text, *more = block.splitlines()
        assert text.startswith(f"  {linear.action}")
        if linear.action == "w8a8":
            worst = min(value for value in linear.sqnr if value is not None)
            assert f"{worst:.1f} dB  {linear.scaling}" in text
            tried = next(table.alternatives for table in report.tables if table.site == linear.site)
            second = sorted(tried, key=lambda method: tried[method])[1]
            assert more == [f"  next best {second}, {tried[second] / (linear.error or 0):.2f} times the error"]


def test_a_part_of_a_name_lists_those_that_have_it(finished: Path) -> None:
    result = explain(finished, "to_k")
    assert result.exit_code == 0
    assert result.stdout.count("w8a8") == 2


def test_a_name_that_fits_none_lists_all_and_is_an_error(finished: Path) -> None:
    result = explain(finished, f"{Q}q")
    assert isinstance(result.exception, OutputError)
    assert str(result.exception) == f"no linear '{Q}q' in {finished}. Did you mean '{Q}'?"
    assert result.stdout.count("w8a8") > 8


def test_what_a_pass_left_alone_is_in_the_report_with_its_reason(finished: Path) -> None:
    report = Report.model_validate_json((finished / "report.json").read_bytes())
    by_name = {item.name: item for item in report.passes}
    assert [item.name for item in report.passes][:2] == ["fold_transpose", "merge_duplicates"]
    assert by_name["factor_scale"].changed
    excluded = [line for line in by_name["quantize_weights"].skipped if line.startswith(f"'{OUT}'")]
    assert excluded == [f"'{OUT}': excluded by --exclude (case 1)"]
    assert ("quantize_weights", "excluded by --exclude (case 1)", [OUT]) in report.left_alone()
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "What the passes left alone" in page
    assert "excluded by --exclude (case 1)" in page
    assert "quantize_weights: excluded by --exclude (case 1)" in re.sub(r"\s+", " ", explain(finished, OUT).stdout)
