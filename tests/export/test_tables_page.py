"""The page about tables tells the truth: what its lines write is what an export takes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import recipe_of

from dq_export.calibration.asymmetry import LIMIT
from dq_export.calibration.table_reader import read_tables
from dq_export.core.qtypes import INT4, INT6, INT8
from dq_export.core.table_file import FORMAT, KEY, PARTS
from dq_export.families.source import load_reference

PAGE = (Path(__file__).parents[2] / "docs" / "tables.md").read_text()


def test_the_lines_of_the_page_write_tables_that_an_export_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "tables.md", "exec"), {})
    reference = load_reference("dit-digits")
    recipe = recipe_of(reference, steps=50)
    tables = read_tables(
        tmp_path / "trained.safetensors", reference, recipe.assign(reference.linears), recipe, reference.timesteps(50)
    )
    (table,) = tables.activations.values()
    assert len(table.bins) == 50
    np.testing.assert_allclose([table.at(1), table.at(981)], [0.05, 0.02], rtol=1e-6)


def test_the_page_names_every_part_and_number() -> None:
    for part in PARTS:
        assert f"`NAME.{part}`" in PAGE
    assert f"`{KEY}`" in PAGE
    assert f"`{FORMAT}`" in PAGE
    assert f"by {LIMIT - 1:.0%} at most".replace("%", " %") in " ".join(PAGE.split())
    for qtype in (INT4, INT6, INT8):
        assert f"{qtype.bits} bits {'hold ' if qtype is INT4 else ''}{qtype.qmin} … {qtype.qmax}" in PAGE
