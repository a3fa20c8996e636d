"""The notebooks run, cell after cell, in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "examples"


def run(name: str) -> dict[str, Any]:
    """The names that a notebook's cells leave; an expression at the end of a cell is evaluated with it."""
    names: dict[str, Any] = {}
    for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    return names


@pytest.mark.slow
def test_the_notebooks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    report = run("export")["report"]
    assert report.verdict.outcome == "passed"
    assert "transformer_blocks.0.ff.net.2 | w8a8" in capsys.readouterr().out
    picture = run("draw")["picture"]
    assert picture.size == (160, 16)
    low, high = picture.getextrema()
    assert low < 20
    assert high > 230
