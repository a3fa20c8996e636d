"""The report as a page to look at."""

from __future__ import annotations

import base64
from pathlib import Path

from .drawing import heat_map, scale_curves, sqnr_plot
from .ledger import write_text
from .report import FRONT, Report


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html."""
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.html", render_html(report, folder / "parity" / "pictures.png", folder / FRONT))


def render_html(report: Report, pictures: Path | None, front: Path | None = None) -> str:
    """One self-contained page: no script, no outside resource."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    image = base64.b64encode(pictures.read_bytes()).decode() if pictures and pictures.exists() else ""
    stages = report.stages()
    return environment.get_template("report.html").render(
        report=report,
        image=image,
        stages=stages,
        plot=sqnr_plot(report),
        heat=heat_map(report),
        curves=scale_curves(report),
        front=front.read_text(encoding="utf-8") if front and front.exists() else "",
    )
