"""A Pareto front as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 640, 400, 56


def draw_front(front: Sequence[tuple[float, float]], others: Sequence[tuple[str, float, float]], unit: str) -> str:
    """An SVG of cost against dB: the front as a line, recipes with one choice everywhere as labelled dots.

    Args:
        front: (cost, dB), by rising cost.
        others: (name, cost, dB).
        unit: of the cost.
    """
    shown = [*front, *((cost, sqnr) for _, cost, sqnr in others if sqnr < 150)]
    shown = [(cost, min(sqnr, 150.0)) for cost, sqnr in shown]
    lowest, highest = (min(cost for cost, _ in shown), max(cost for cost, _ in shown)) if shown else (0.0, 1.0)
    bottom, top = (min(sqnr for _, sqnr in shown), max(sqnr for _, sqnr in shown)) if shown else (0.0, 1.0)
    wide, high = (highest - lowest) or 1.0, (top - bottom) or 1.0

    def place(cost: float, sqnr: float) -> tuple[float, float]:
        x = MARGIN + (cost - lowest) / wide * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (min(sqnr, 150.0) - bottom) / high * (HEIGHT - 2 * MARGIN)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for step in range(5):
        cost, sqnr = lowest + wide * step / 4, bottom + high * step / 4
        x, y = place(cost, sqnr)
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{cost:.3g}</text>')
        lines.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{sqnr:.0f}</text>')
        lines.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
    lines.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(unit)}</text>')
    lines.append(f'<text x="14" y="{MARGIN - 24}">dB of the sampled trajectory</text>')
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(place(*point) for point in front))
    lines.append(f'<path d="{path}" fill="none" stroke="#0a6" stroke-width="2"/>')
    lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#0a6"/>' for x, y in (place(*point) for point in front)]
    for name, cost, sqnr in others:
        if sqnr < 150:
            x, y = place(cost, sqnr)
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#c30"/>')
            lines.append(f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" fill="#c30">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
