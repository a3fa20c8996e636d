"""Coordinates and colours of the report's figures; the template only writes them out.

Every axis of timesteps runs as the sampler does: noise at the left, the picture at the right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dq_export.deploy.parity import CallParity

from .report import FLOAT_STAGE, Report

CELL, HEAD = 14, 40
"""Pixels of the heat map: a cell's width and height, and the height above the cells."""
LETTER = 6.0
"""The greatest mean width, in pixels, of letters of 10 px."""
COLUMNS = 25
"""The greatest number of timesteps of the heat map; they are evenly spaced."""
COLD, HOT = 20.0, 55.0
"""dB at the ends of the heat map's colours."""
CIVIDIS = (
    (0, 32, 77), (0, 54, 112), (49, 75, 107), (75, 96, 108), (101, 118, 114),
    (127, 140, 120), (156, 164, 117), (188, 189, 107), (222, 216, 85), (255, 234, 70),
)  # fmt: skip
"""Evenly spaced colours of cividis, which people with and without colour blindness see as rising in lightness.

Source: Nuñez, Anderton and Renslow, "Optimizing colormaps with consideration for color vision deficiency", 2018.
"""
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
"""Lines of one figure also differ by their dashes: not everybody can distinguish six colours."""
SPAN = 40.0
"""dB below the lowest call within which the figure shows the limit; one further off would flatten the curve."""


def sqnr_plot(report: Report) -> dict[str, object]:
    """SQNR of each network call over the timestep, with the recipe's limit and the worst call."""
    calls = report.parity.calls if report.parity else ()
    lines = {stage: [call for call in calls if call.stage == stage] for stage in report.stages() if stage != FLOAT_STAGE}
    return calls_plot(lines, report.verdict.min_sqnr if report.verdict else None)


def calls_plot(series: Mapping[str, Sequence[CallParity]], limit: float | None) -> dict[str, object]:
    """Several lines of SQNR over the timestep, 640 x 240; empty without any call.

    Args:
        limit: dB that every call must keep; None: no line is drawn.
    """
    calls = [call for line in series.values() for call in line]
    if not calls:
        return {}
    noise, picture = max(c.timestep for c in calls), min(c.timestep for c in calls)
    worst = min(calls, key=lambda call: call.sqnr)
    if limit is not None and limit < worst.sqnr - SPAN:
        limit = None
    heights = [c.sqnr for c in calls] + ([limit] if limit is not None else [])
    top = max(10 * math.ceil(max(heights) / 10), 10)
    low = min(10 * math.floor(min(heights) / 10), top - 10)

    def place(timestep: float, sqnr: float) -> tuple[float, float]:
        return (50 + 570 * (noise - timestep) / max(noise - picture, 1e-9), 22 + 180 * (top - sqnr) / (top - low))

    lines = {}
    for name, line in series.items():
        points = sorted(((c.timestep, c.sqnr) for c in line), reverse=True)
        if points:
            lines[name] = _points([place(*point) for point in points])
    ticks = [(place(noise, value)[1], value) for value in range(low, top + 1, 10 if top - low <= 60 else 20)]
    x, y = place(worst.timestep, worst.sqnr)
    return {
        "lines": lines,
        "ticks": ticks,
        "noise": f"{noise:g}",
        "picture": f"{picture:g}",
        "limit": None if limit is None else (place(noise, limit)[1], f"limit {limit:g} dB"),
        "worst": (x, y, f"worst: {worst.sqnr:.1f} dB at {worst.timestep:g}", "end" if x > 320 else "start"),
    }


def heat_map(report: Report) -> dict[str, object]:
    """A cell for each linear and timestep, dark blue at 20 dB and below, yellow at 55 dB and above."""
    rows, times = report.heat(), report.measured_at
    if not rows or not times:
        return {}
    order = sorted(range(len(times)), key=lambda i: -times[i])
    columns = min(COLUMNS, len(order))
    timesteps = [order[round(i * (len(order) - 1) / max(columns - 1, 1))] for i in range(columns)]  # the first and the last, too
    names = [linear.name.removeprefix("transformer_blocks.") for linear in rows]
    label = math.ceil(LETTER * max(len(f"{name} {row.action}") for name, row in zip(names, rows, strict=True))) + 6
    cells = []
    for y, linear in enumerate(rows):
        for x, index in enumerate(timesteps):
            value = linear.sqnr[index]
            if value is not None:
                title = f"{linear.name}, timestep {times[index]:g}: {value:.1f} dB"
                cells.append((label + x * CELL, HEAD + y * CELL, _colour(value), title))
    labels = [
        (HEAD + y * CELL + CELL - 3, name, row.action, anchor(report, row.name))
        for y, (name, row) in enumerate(zip(names, rows, strict=True))
    ]
    ticks = [(label + x * CELL, f"{times[i]:g}") for x, i in enumerate(timesteps) if x % 6 == 0]
    legend = [(_colour(value), _ink(value), f"{value:.0f}") for value in range(int(COLD), int(HOT) + 1, 7)]
    width, height = max(label + len(timesteps) * CELL + 10, label + 140), HEAD + len(rows) * CELL + 6
    return {
        "cells": cells, "labels": labels, "ticks": ticks, "legend": legend, "left": label, "width": width, "height": height,
        "cell": CELL,
    }  # fmt: skip


def scale_curves(report: Report) -> list[dict[str, object]]:
    """Each kind of site's scale tables over the timestep, relative to their greatest, 300 x 156; sites of one kind together."""
    tables = [table for table in report.tables if len(table.scales) > 1]
    kinds: dict[str, list[tuple[str, str]]] = {}
    if not tables:
        return []
    noise = max(edge for table in tables for edge in table.edges) * 1.02 or 1.0
    for table in tables:
        largest, edges = max(table.scales), [0.0, *table.edges, noise]
        points: list[tuple[float, float]] = []
        for scale, start, stop in zip(table.scales, edges, edges[1:], strict=False):
            y = 22 + 110 * (1 - scale / largest)
            points += [(290 - 260 * start / noise, y), (290 - 260 * stop / noise, y)]
        kinds.setdefault(kind_of(table.site), []).append((table.site, _points(points)))
    return [
        {
            "kind": kind,
            "lines": [(name, points, i % len(DASHES) + 1, DASHES[i % len(DASHES)]) for i, (name, points) in enumerate(lines)],
            "noise": f"{noise:.0f}",
        }
        for kind, lines in kinds.items()
    ]


def kind_of(site: str) -> str:
    """A site's name without the numbers of its blocks: `blocks.3.ff` and `blocks.4.ff` are of one kind."""
    return ".".join(part for part in site.split(".") if not part.isdigit())


def block_of(site: str) -> str:
    """The numbers of a site's blocks, which tell sites of one kind apart: `blocks.3.ff.net.0` has `3.0`."""
    return ".".join(part for part in site.split(".") if part.isdigit()) or site


def anchor(report: Report, linear: str) -> str:
    """The name of a linear in the page's links: its number, because module names may contain any letter."""
    return str([item.name for item in report.linears].index(linear))


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _share(sqnr: float) -> float:
    return min(max((sqnr - COLD) / (HOT - COLD), 0.0), 1.0)


def _colour(sqnr: float) -> str:
    """Cividis between its stops."""
    place = _share(sqnr) * (len(CIVIDIS) - 1)
    index = min(int(place), len(CIVIDIS) - 2)
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(CIVIDIS[index], CIVIDIS[index + 1], strict=True))
    return f"rgb({' '.join(map(str, mixed))})"


def _ink(sqnr: float) -> str:
    """A colour of text that is readable on `_colour`."""
    return "#fff" if _share(sqnr) < 0.45 else "#000"
