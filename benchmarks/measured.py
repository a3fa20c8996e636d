"""Writes the tables of docs/measured.md from the result files in benchmarks/results/: `python benchmarks/measured.py`.

A result file is JSON with `command`, `machine`, `date`, `columns` and `rows`, each row a list of texts. If the date of the run is
not recorded, `date` is null and `since` is the date since which the repository has all rows. The page has a pair of comments for
each file, and this program writes the text between them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "measured.md", ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def table(path: Path) -> str:
    """Return a result file as Markdown: the table, its command, machine and date."""
    result = json.loads(path.read_text(encoding="utf-8"))
    width = len(result["columns"])
    if any(len(row) != width for row in result["rows"]):
        raise SystemExit(f"{path}: a row without exactly {width} cells, one for each column")
    lines = [_row(result["columns"]), "|" + "---|" * width, *map(_row, result["rows"])]
    date = result["date"] or f"the date of the run is not recorded, in the repository since {result['since']}"
    return "\n".join([*lines, "", f"*`{result['command']}`; {result['machine']}; {date}.*"])


def updated(page: str) -> str:
    """Return the page with all tables written again."""
    return BLOCK.sub(lambda match: _block(match[1]), page)


def tables_of(page: str) -> list[str]:
    """Return the names of the page's tables, in their order."""
    return BLOCK.findall(page)


def _block(name: str) -> str:
    return f"<!-- table: {name} -->\n{table(RESULTS / f'{name}.json')}\n<!-- end -->"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
