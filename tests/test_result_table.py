"""What a benchmark prints and writes is what the page of measurements shows."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import measured
import pytest
from result_table import ResultTable


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "table.json"
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/distill.py", "--forms", "w4a8 per token", "--json", str(path), "--models", "plain"]
    )
    return path


def test_the_page_shows_what_a_benchmark_printed(command_line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = ResultTable(("model", "dB"), command_line)
    table.add(["dit-digits", "45.5 +4.4"])
    table.add(["hard copy", "43.2 +6.2"])
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["| model | dB |", "|---|---|", "| dit-digits | 45.5 +4.4 |", "| hard copy | 43.2 +6.2 |"]
    page = measured.table(command_line)
    assert page.startswith(printed)
    assert "`python benchmarks/distill.py --forms 'w4a8 per token' --models plain`" in page
    assert page.endswith(f"; {date.today()}.*")


def test_a_run_that_is_stopped_keeps_its_rows(command_line: Path) -> None:
    table = ResultTable(("model", "dB"), command_line)
    for number in range(2):
        table.add(["dit-digits", f"{number}"])
        assert len(json.loads(command_line.read_text())["rows"]) == number + 1


def test_a_row_has_a_cell_for_each_column(command_line: Path) -> None:
    with pytest.raises(ValueError, match=r"a row of 1 cells in a table of 2 columns: \['dit-digits'\]"):
        ResultTable(("model", "dB"), command_line).add(["dit-digits"])
    assert not command_line.exists()
