"""The report's page: whole, self-contained, and showing what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny

from dq_export.calibration.recipe import Recipe
from dq_export.comparison import save_pictures
from dq_export.drawing import heat_map, scale_curves, sqnr_plot
from dq_export.page import render_html
from dq_export.pipeline import run
from dq_export.report import Report


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = save_tiny(tmp_path_factory.mktemp("model"), in_channels=1, out_channels=1)
    out = tmp_path_factory.mktemp("out") / "out"
    values = {"model": str(folder), "steps": 6, "calib_size": 2, "parity_size": 2, "min_sqnr": -100, "bins": "per-step"}
    report = run(Recipe.parse(values, "test"), out)
    assert report is not None
    return out, report


def test_every_quantized_linear_has_a_cell_at_every_timestep(exported: Any) -> None:
    _, report = exported
    drawn: Any = heat_map(report)
    quantized = [linear for linear in report.linears if linear.action == "w8a8"]
    assert len(drawn["labels"]) == len(quantized) == 12
    assert len(drawn["cells"]) == 12 * 6
    for linear in quantized:
        assert len(linear.sqnr) == 6
        assert all(value is not None and 25 < value < 80 for value in linear.sqnr)
    assert len({colour for _, _, colour, _ in drawn["cells"]}) > 3


def test_what_is_measured_is_the_linears_own_error(exported: Any) -> None:
    """A linear's noise over all timesteps is about that which its scaling was chosen by."""
    _, report = exported
    for linear in report.linears:
        if linear.error:
            mean = np.mean([10 ** (-value / 10) for value in linear.sqnr if value is not None])
            assert 0.2 < mean / linear.error < 5  # of one reader, and of all readers of the input together


def test_curves_have_a_step_for_every_bin(exported: Any) -> None:
    _, report = exported
    curves: Any = scale_curves(report)
    block = "transformer_blocks"
    expected = {f"{block}.attn1.to_q", f"{block}.attn1.to_out", f"{block}.ff.net.proj", f"{block}.ff.net"}
    assert {curve["kind"] for curve in curves} == expected
    for curve in curves:
        assert len(curve["lines"]) == 2
        for name, points, _ in curve["lines"]:
            table = next(table for table in report.tables if table.site == name)
            assert len(points.split()) == 2 * len(table.scales)
            heights = [float(point.split(",")[1]) for point in points.split()]
            assert min(heights) == 10  # the greatest scale touches the top


def test_the_page_needs_nothing_from_outside(exported: Any) -> None:
    out, report = exported
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    headings = ("Every linear at every timestep", "Scale tables", "four times their difference", "Left float", "Kernels")
    for heading in headings:
        assert heading in page
    assert "The search that found" not in page
    bare = Report.model_validate({**report.model_dump(), "parity": None, "audit": None, "tables": [], "measured_at": []})
    assert sqnr_plot(bare) == {}
    assert heat_map(bare) == {}
    assert "Every linear at every timestep" not in render_html(bare, None)


def test_pictures_of_float_engine_and_difference_stand_in_three_rows(tmp_path: Path) -> None:
    from PIL import Image

    rows = [np.full((2, 1, 16, 16), value, dtype=np.float32) for value in (-1, 0, 1)]
    assert save_pictures(tmp_path / "p.png", rows)
    drawn = np.asarray(Image.open(tmp_path / "p.png"))
    assert drawn.shape[0] * 2 == drawn.shape[1] * 3
    third = len(drawn) // 3
    assert [int(drawn[i * third + third // 2, third // 2]) for i in range(3)] == [0, 128, 255]
