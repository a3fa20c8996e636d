"""Coordinates and colours of the report's figures: the template only writes them down."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .report import Report

CELL, LABEL, HEAD = 14, 150, 24
"""Pixels of the heat map: a cell's width and height, of its labels, and above it."""
COLUMNS = 25
"""Timesteps that the heat map shows at most, evenly spaced."""
COLD, HOT = 20.0, 55.0
"""dB at the ends of the heat map's colours."""
DISTINCT = ("#0b6bcb", "#c2702b", "#2a8f5b", "#8a4fbf", "#b3243e", "#5b6575")


def sqnr_plot(report: Report) -> dict[str, object]:
    """SQNR of each network call over the timestep, 640 x 220."""
    calls = [call for call in report.parity.calls if call.stage != "float-onnx"] if report.parity else []
    if not calls:
        return {}
    left, right = min(c.timestep for c in calls), max(c.timestep for c in calls)
    top = max(10 * math.ceil(max(c.sqnr for c in calls) / 10), 10)
    low = min(10 * math.floor(min(c.sqnr for c in calls) / 10), top - 10)

    def place(timestep: float, sqnr: float) -> tuple[float, float]:
        return (50 + 570 * (timestep - left) / max(right - left, 1e-9), 10 + 180 * (top - sqnr) / (top - low))

    lines = {}
    for stage in report.stages():
        points = sorted((c.timestep, c.sqnr) for c in calls if c.stage == stage)
        if points:
            lines[stage] = _points([place(*point) for point in points])
    ticks = [(place(left, value)[1], value) for value in range(low, top + 1, 10 if top - low <= 60 else 20)]
    return {"lines": lines, "ticks": ticks, "left": f"{left:g}", "right": f"{right:g}"}


def heat_map(report: Report) -> dict[str, object]:
    """A cell for each linear and timestep, red at 20 dB and below, green at 55 dB and above."""
    rows, times = report.heat(), report.measured_at
    if not rows or not times:
        return {}
    order = sorted(range(len(times)), key=lambda i: -times[i])
    columns = min(COLUMNS, len(order))
    shown = [order[round(i * (len(order) - 1) / max(columns - 1, 1))] for i in range(columns)]  # the first and the last, too
    cells = []
    for y, linear in enumerate(rows):
        for x, index in enumerate(shown):
            value = linear.sqnr[index]
            if value is not None:
                title = f"{linear.name}, timestep {times[index]:g}: {value:.1f} dB"
                cells.append((LABEL + x * CELL, HEAD + y * CELL, _colour(value), title))
    labels = [(HEAD + y * CELL + CELL - 3, linear.name, linear.action) for y, linear in enumerate(rows)]
    ticks = [(LABEL + x * CELL, f"{times[i]:g}") for x, i in enumerate(shown) if x % 6 == 0]
    legend = [(_colour(value), f"{value:.0f}") for value in range(int(COLD), int(HOT) + 1, 7)]
    width, height = LABEL + len(shown) * CELL + 10, HEAD + len(rows) * CELL + 6
    return {"cells": cells, "labels": labels, "ticks": ticks, "legend": legend, "width": width, "height": height, "cell": CELL}


def scale_curves(report: Report) -> list[dict[str, object]]:
    """Each kind of site's scale tables over the timestep, relative to their greatest, 300 x 140; sites of one kind together."""
    tables = [table for table in report.tables if len(table.scales) > 1]
    kinds: dict[str, list[tuple[str, str]]] = {}
    if not tables:
        return []
    last = max(edge for table in tables for edge in table.edges) * 1.02 or 1.0
    for table in tables:
        largest, edges = max(table.scales), [0.0, *table.edges, last]
        points: list[tuple[float, float]] = []
        for scale, start, stop in zip(table.scales, edges, edges[1:], strict=False):
            y = 10 + 110 * (1 - scale / largest)
            points += [(30 + 260 * start / last, y), (30 + 260 * stop / last, y)]
        kind = ".".join(part for part in table.site.split(".") if not part.isdigit())
        kinds.setdefault(kind, []).append((table.site, _points(points)))
    found: list[dict[str, object]] = []
    for kind, lines in kinds.items():
        coloured = [(name, points, DISTINCT[i % len(DISTINCT)]) for i, (name, points) in enumerate(lines)]
        found.append({"kind": kind, "lines": coloured, "last": f"{last:.0f}"})
    return found


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _colour(sqnr: float) -> str:
    share = min(max((sqnr - COLD) / (HOT - COLD), 0.0), 1.0)
    return f"hsl({round(120 * share)} 62% {round(46 + 10 * share)}%)"
