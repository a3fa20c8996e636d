"""The tables of docs/measured.md, from the result files in benchmarks/results/: `python benchmarks/measured.py`.

A result file is JSON: `command`; `machine`; `date` of the run, or null where nobody wrote it down, and then `since`: the
date since when the repository holds all rows; `columns`; `rows`, a list of texts each. The page has a pair of comments for
each file, and what stands between them is written by this program.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "measured.md", ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def table(path: Path) -> str:
    """The Markdown of a result file: the table, its command, machine and date."""
    result = json.loads(path.read_text(encoding="utf-8"))
    width = len(result["columns"])
    if any(len(row) != width for row in result["rows"]):
        raise SystemExit(f"{path}: a row without exactly {width} cells, one for each column")
    lines = [_row(result["columns"]), "|" + "---|" * width, *map(_row, result["rows"])]
    date = result["date"] or f"the date of the run is not recorded, in the repository since {result['since']}"
    return "\n".join([*lines, "", f"*`{result['command']}`; {result['machine']}; {date}.*"])


def written(page: str) -> str:
    """The page with every table made anew."""
    return BLOCK.sub(lambda match: _block(match[1]), page)


def tables_of(page: str) -> list[str]:
    """Names of the page's tables, in its order."""
    return BLOCK.findall(page)


def _block(name: str) -> str:
    return f"<!-- table: {name} -->\n{table(RESULTS / f'{name}.json')}\n<!-- end -->"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
