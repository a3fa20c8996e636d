"""A table that a benchmark prints row by row, and a result file of it that `benchmarks/measured.py` reads."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from dq_export.machine import cpu_name, versions


class ResultTable:
    """Prints its rows as Markdown.

    Args:
        columns: names of the columns.
        path: a file that is written anew after each row, so that a run which is stopped keeps its rows; None: no file.
    """

    def __init__(self, columns: Sequence[str], path: Path | None = None) -> None:
        self.columns, self.path = list(columns), path
        self.rows: list[list[str]] = []

    def add(self, row: Sequence[str]) -> None:
        """Print a row, below the names of the columns if it is the first one.

        Raises:
            ValueError: the row has more or fewer cells than the table has columns.
        """
        if len(row) != len(self.columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(self.columns)} columns: {row}")
        if not self.rows:
            print(f"| {' | '.join(self.columns)} |\n{'|---' * len(self.columns)}|")
        self.rows.append(list(row))
        print(f"| {' | '.join(row)} |", flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")

    def content(self) -> dict[str, object]:
        """Return what the file holds: the command, the machine, the date, the columns and the rows."""
        installed = versions()
        machine = f"{os.cpu_count()} cores, {cpu_name()}; torch {installed['torch']}, ONNX Runtime {installed['onnxruntime']}"
        heading = {"command": _command(), "machine": machine, "date": date.today().isoformat()}
        return {**heading, "columns": self.columns, "rows": self.rows}


def _command() -> str:
    """Return the command line of this process without `--json FILE`, which changes no figure."""
    words, arguments = [], iter(sys.argv[1:])
    for word in arguments:
        if word == "--json":
            next(arguments, None)
        elif not word.startswith("--json="):
            words.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
