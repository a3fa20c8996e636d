"""A Pareto front as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from string import ascii_lowercase

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 420, 56, 500, 44, 372
"""The picture's size, and the axes inside it; the legend is at the right."""
ROW = 17
"""Pixels between two lines of the legend."""
EXACT = 150.0
"""dB from which a trajectory counts as the float network's: it is listed but not drawn, because it would squeeze all others."""
MIXES, UNIFORM, WINNER, BOUND = "#0b6bcb", "#b35c12", "#124", "#777"
"""Colours; blue and orange also differ for colour-blind readers."""
LABEL = (9.0, 12.0)
"""Width and height of a letter."""
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Front:
    """Cost against dB of the sampled trajectory.

    Args:
        unit: the unit of costs.
        mixes: (cost, dB) of the mixes that nothing beats in both, by rising cost: a line.
        uniform: (name, cost, dB) of one choice everywhere: dots with letters, which the legend explains.
        winner: (cost, dB), or None.
        limit: the greatest cost that was allowed, or None.
        target: the dB of the request, or None.
    """

    unit: str
    mixes: tuple[Point, ...]
    uniform: tuple[tuple[str, float, float], ...] = ()
    winner: Point | None = None
    limit: float | None = None
    target: float | None = None

    def draw(self) -> str:
        """The picture as SVG. The axis of costs is logarithmic."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            *self._axes(),
            *self._bounds(),
            *self._points(),
            *self._legend(),
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def _ranges(self) -> tuple[Point, Point]:
        """(lowest, highest) log cost and dB of all points, with a margin."""
        points = [
            point for point in (*self.mixes, *((c, s) for _, c, s in self.uniform), self.winner) if point and point[1] < EXACT
        ]
        costs = [math.log(cost) for cost, _ in points] + ([math.log(self.limit)] if self.limit else [])
        heights = [sqnr for _, sqnr in points] + ([self.target] if self.target is not None else [])
        return _widened(costs), _widened(heights)

    def _place(self, cost: float, sqnr: float) -> Point:
        """The place of a cost and a dB in the picture."""
        (low, high), (bottom, top) = self._ranges()
        x = LEFT + (math.log(cost) - low) / (high - low) * (RIGHT - LEFT)
        return x, BOTTOM - (sqnr - bottom) / (top - bottom) * (BOTTOM - TOP)

    def _axes(self) -> Iterator[str]:
        (low, high), (bottom, top) = self._ranges()
        for step in range(5):
            cost, sqnr = math.exp(low + (high - low) * step / 4), bottom + (top - bottom) * step / 4
            x, y = self._place(cost, sqnr)
            yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}M{x:.1f} {BOTTOM}v4" stroke="#ddd" fill="none"/>'
            yield f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{cost:.3g}</text>'
            yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{sqnr:.0f}</text>'
        yield f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(self.unit)}</text>'
        yield f'<text x="14" y="{TOP - 26}">dB of the sampled trajectory</text>'

    def _bounds(self) -> Iterator[str]:
        """The limit or the target as a dashed line with its name at the end."""
        style = f'stroke="{BOUND}" stroke-dasharray="5 4"'
        if self.limit:
            x, _ = self._place(self.limit, 0.0)
            side, shift = ("end", -5) if x > (LEFT + RIGHT) / 2 else ("start", 5)
            yield f'<path d="M{x:.1f} {TOP - 14}V{BOTTOM}" {style}/>'
            text = f"limit {self.limit:g} {escape(self.unit)}"
            yield f'<text x="{x + shift:.1f}" y="{TOP - 8}" text-anchor="{side}" fill="{BOUND}">{text}</text>'
        if self.target is not None:
            _, y = self._place(1.0, self.target)
            yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" {style}/>'
            yield f'<text x="{RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end" fill="{BOUND}">target {self.target:g} dB</text>'

    def _points(self) -> Iterator[str]:
        line = [self._place(*point) for point in self.mixes if point[1] < EXACT]
        path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(line))
        yield f'<path d="{path}" fill="none" stroke="{MIXES}" stroke-width="2"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{MIXES}"/>' for x, y in line)
        letters = [(letter, self._place(cost, sqnr)) for letter, (_, cost, sqnr) in self._lettered() if sqnr < EXACT]
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{UNIFORM}"/>' for _, (x, y) in letters)
        if self.winner and self.winner[1] < EXACT:
            x, y = self._place(*self.winner)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="{WINNER}" stroke-width="2"/>'
        for (letter, _), (x, y) in zip(letters, label_places([point for _, point in letters]), strict=True):
            yield f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" fill="{UNIFORM}">{letter}</text>'

    def _lettered(self) -> list[tuple[str, tuple[str, float, float]]]:
        """The uniform recipes by letter."""
        return list(zip(ascii_lowercase, self.uniform, strict=False))

    def _legend(self) -> Iterator[str]:
        x, y = RIGHT + 26, TOP
        rows = [(MIXES, "", "mixes that nothing beats in both", "")]
        if self.winner:
            rows.append((WINNER, "", "found (ringed)", self._figures(*self.winner)))
        rows += [(UNIFORM, letter, name, self._figures(cost, sqnr)) for letter, (name, cost, sqnr) in self._lettered()]
        for colour, letter, name, figures in rows:
            yield f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>'
            yield f'<text x="{x + 14}" y="{y}" fill="{colour}">{letter}</text>'
            yield f'<text x="{x + 28 if letter else x + 14}" y="{y}">{escape(name)}</text>'
            if figures:
                y += ROW - 3
                yield f'<text x="{x + 28 if letter else x + 14}" y="{y}" fill="#555" font-size="11">{escape(figures)}</text>'
            y += ROW

    def _figures(self, cost: float, sqnr: float) -> str:
        exact = "no error: off the scale" if sqnr >= EXACT else f"{sqnr:.1f} dB"
        return f"{cost:.3g} {self.unit}, {exact}"


def label_places(points: Sequence[Point]) -> list[Point]:
    """Centres of the points' labels, near the points, such that no label covers a point or another label."""
    placed: list[Point] = []
    for x, y in points:
        candidates = [
            (x + radius * math.cos(angle * math.pi / 4), y + radius * math.sin(angle * math.pi / 4))
            for radius in range(12, 80, 4)
            for angle in range(8)
        ]
        free = (
            c for c in candidates if not any(_covers(c, other) for other in placed) and not any(_covers(c, p) for p in points)
        )
        placed.append(next(free, candidates[0]))
    return placed


def _covers(first: Point, second: Point) -> bool:
    return abs(first[0] - second[0]) < LABEL[0] and abs(first[1] - second[1]) < LABEL[1]


def _widened(values: Sequence[float]) -> Point:
    """The range of the values, widened by 4 % at each end; (0, 1) without values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin
