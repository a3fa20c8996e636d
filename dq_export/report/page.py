"""The report as a page to look at."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from dq_export.core.documents import DocumentError, MissingError, printable, read_bytes, shown_path
from dq_export.deploy.replay import COMMAND

from ..output_folder import OutputError, write_text
from .drawing import block_of, heat_map, kind_of, scale_curves, sqnr_plot
from .report import FRONT, Report

PICTURE_LIMIT = 64 << 20
"""The greatest size, in bytes, of a picture in the page."""
PNG, SVG = b"\x89PNG\r\n\x1a\n", b"<svg "


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.html and, where calls were compared, parity/command.txt for people and CIs.

    Raises:
        OutputError: a file in the place of a picture is not a picture.
    """
    page = render_html(report, read_picture(folder / "parity" / "pictures.png", PNG), read_picture(folder / FRONT))
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.html", page)
    if report.parity:
        write_text(folder / "parity" / COMMAND, report.parity.replay + "\n")


def read_picture(path: Path, start: bytes = SVG) -> bytes | None:
    """A picture's bytes; None if there is no file. Links are not followed: the page would show the content of their target.

    Args:
        start: the first bytes of files of its kind.

    Raises:
        OutputError: it is not a regular file, too large or another kind of file.
    """
    try:
        content = read_bytes(path, PICTURE_LIMIT, links=False)
    except MissingError:
        return None
    except DocumentError as error:
        raise OutputError(f"{error}; the report would show it: remove it") from error
    if not content.startswith(start):
        raise OutputError(f"{shown_path(path)}: no picture that starts with {start!r}; the report would show it: remove it")
    return content


def render_html(report: Report, pictures: bytes | None, front: bytes | None = None) -> str:
    """One self-contained page: no script, no outside resource; pictures are embedded as images, which run no script.

    Args:
        pictures: PNG. front: SVG.
    """
    environment = templates()
    environment.filters.update(kind=kind_of, block=block_of)
    stages, curves = report.stages(), scale_curves(report)
    page: str = environment.get_template("report.html").render(
        report=report,
        verdict=report.verdict,
        pictures=base64.b64encode(pictures or b"").decode(),
        stages=stages,
        plot=sqnr_plot(report),
        heat=heat_map(report),
        heated=report.heat(),
        curves=curves,
        kinds=[curve["kind"] for curve in curves],
        front=base64.b64encode(front or b"").decode(),
    )
    return page


def templates() -> Any:
    """The jinja2 environment of the pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )


def _shown(value: object) -> object:
    """A value without control characters: people also read pages in a terminal."""
    return printable(value, 10 * len(value)) if isinstance(value, str) and not value.isprintable() else value
