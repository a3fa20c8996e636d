"""The picture of a search's front."""

from __future__ import annotations

from typing import Any

from dq_export.report.front import EXACT, UNIFORM, Front, label_places

SVG = "{http://www.w3.org/2000/svg}"


def svg_of(front: Front) -> Any:
    import xml.etree.ElementTree as Xml

    return Xml.fromstring(front.draw())


def texts(picture: Any) -> list[str]:
    return [item.text or "" for item in picture.iter(f"{SVG}text")]


def test_the_picture_of_the_front_is_whole() -> None:
    uniform = (("float", 12.7, 200.0), ("w8a8 <token>", 4.8, 47.0), ("w4a8", 3.5, 28.0))
    front = Front(unit="MB", mixes=((3.4, 27.0), (4.3, 45.0), (12.7, 200.0)), uniform=uniform, winner=(4.3, 45.0), limit=4.4)
    picture = svg_of(front)
    assert {"w8a8 <token>", "float", "limit 4.4 MB", "12.7 MB, no error: off the scale"} <= set(texts(picture))
    dots = [
        (float(item.get("cx")), float(item.get("cy"))) for item in picture.iter(f"{SVG}circle") if item.get("fill") == UNIFORM
    ]
    inside = [point for point in dots if point[0] <= 500]
    assert len(inside) == 2, "the float point would squeeze the others"
    heights = sorted(y for _, y in inside)
    assert heights[1] - heights[0] > 200
    dashed = [item.get("d") for item in picture.iter(f"{SVG}path") if item.get("stroke-dasharray")]
    assert len(dashed) == 1
    limit = float(dashed[0][1:].split()[0])
    assert inside[1][0] < limit < inside[0][0], "between w4a8 and w8a8"
    assert "target 40 dB" in texts(svg_of(Front(unit="ms", mixes=(), target=40.0)))
    svg_of(Front(unit="ms", mixes=((1.0, EXACT),)))


def test_labels_lie_apart_from_each_other_and_from_the_points() -> None:
    points = [(100.0 + i % 3, 100.0 + i // 3) for i in range(8)]
    placed = label_places(points)
    for number, (x, y) in enumerate(placed):
        assert all(abs(x - a) >= 9 or abs(y - b) >= 12 for a, b in (*placed[:number], *points))
