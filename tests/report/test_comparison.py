"""Two exports side by side."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import call

from dq_export.output_folder import OutputError
from dq_export.report.comparison import compare_folders, write_comparison
from dq_export.report.report import Report


@pytest.fixture
def other(tiny_exported: Path, tmp_path: Path) -> Path:
    """The compared values of an export, with other numbers: half the size, 3 dB more, one linear in float."""
    folder = tmp_path / "other <b>"
    folder.mkdir()
    text = (tiny_exported / "recipe.yaml").read_text()
    assert "bits: w8a8" in text
    (folder / "recipe.yaml").write_text(text.replace("rounding: rtn", "rounding: gptq"))
    report = Report.model_validate_json((tiny_exported / "report.json").read_text())
    assert report.parity
    assert report.size
    assert report.audit
    calls = tuple(replace(item, sqnr=item.sqnr + 3) for item in report.parity.calls)
    size = report.size.model_copy(update={"engine_bytes": report.size.engine_bytes // 2})
    linears = [
        item.model_copy(update={"action": "float", "sqnr": []}) if item.name == "transformer_blocks.1.ff.net.2" else item
        for item in report.linears
    ]
    gemms = tuple(replace(item, kernel="MatMulNBits") for item in report.audit.gemms)
    changes = {
        "parity": replace(report.parity, calls=calls), "size": size, "linears": linears,
        "audit": replace(report.audit, gemms=gemms),
    }  # fmt: skip
    (folder / "report.json").write_text(report.model_copy(update=changes).model_dump_json())
    return folder


def test_recipe_calls_kernels_size_and_linears_are_set_side_by_side(tiny_exported: Path, other: Path) -> None:
    report = Report.model_validate_json((tiny_exported / "report.json").read_text())
    assert report.size
    comparison = compare_folders(tiny_exported, other)
    assert comparison.recipe == (("rounding", "rtn", "gptq"),)
    results = {name: (one, two) for name, one, two in comparison.results}
    worst = report.worst_call("engine")
    assert worst
    at = f"dB at timestep {worst.timestep:g}"
    assert results["worst call"] == (f"{worst.sqnr:.1f} {at}", f"{worst.sqnr + 3:.1f} {at}")
    assert results["mean SQNR of a call"][1] == f"{report.mean_sqnr('engine') + 3:.1f} dB"
    assert [text.split(" MB")[0] for text in results["size"]] == [
        f"{report.size.engine_bytes / 1e6:.1f}", f"{report.size.engine_bytes // 2 / 1e6:.1f}"
    ]  # fmt: skip
    kernels = {name: (one, two) for name, one, two in comparison.kernels}
    assert kernels["MatMulNBits"][1] == "100.0%"
    assert kernels["MatMulIntegerToFloat"][1] == "-"
    ((name, one, two),) = comparison.linears
    assert (name, two) == ("transformer_blocks.1.ff.net.2", "float")
    assert one.startswith("w8a8, ")


def test_an_export_beside_itself_differs_in_nothing(tiny_exported: Path, tmp_path: Path) -> None:
    comparison = compare_folders(tiny_exported, tiny_exported)
    assert comparison.recipe == comparison.linears == ()
    assert all(one == two for _, one, two in (*comparison.results, *comparison.kernels))
    write_comparison(comparison, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Both recipes are the same." in page
    assert page.count("<polyline") == 2


def test_the_command_prints_tables_and_writes_a_page_that_needs_nothing(tiny_exported: Path, other: Path, tmp_path: Path) -> None:
    result = call("compare", tiny_exported, other, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    for word in ("rounding", "worst call", "MatMulIntegerToFloat", "transformer_blocks.1.ff.net.2", "page: compare.html"):
        assert word in result.stdout
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    assert "other &lt;b&gt;" in page
    assert "<b>" not in page


def test_a_folder_that_is_not_an_export_is_refused_by_name(tiny_exported: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nowhere: no such folder"):
        compare_folders(tiny_exported, tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"no report\.json, recipe\.yaml"):
        compare_folders(tmp_path, tiny_exported)
