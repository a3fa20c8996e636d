"""The report's page: whole, self-contained, and showing what was measured."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny

from dq_export.core.recipe import Recipe
from dq_export.output_folder import OutputError
from dq_export.pipeline import run
from dq_export.preparation import Options
from dq_export.report.drawing import heat_map, scale_curves, sqnr_plot
from dq_export.report.page import read_picture, render_html
from dq_export.report.report import Report
from dq_export.stages.verify import save_pictures


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = save_tiny(tmp_path_factory.mktemp("model"), in_channels=1, out_channels=1)
    out = tmp_path_factory.mktemp("out") / "out"
    values = {"model": str(folder), "steps": 6, "calib_size": 2, "parity_size": 2, "min_sqnr": -100, "bins": "per-step"}
    report = run(Recipe.parse(values, "test"), out)
    assert report is not None
    return out, report


def test_every_quantized_linear_has_a_cell_at_every_timestep(exported: Any) -> None:
    _, report = exported
    figure: Any = heat_map(report)
    quantized = [linear for linear in report.linears if linear.action == "w8a8"]
    assert len(figure["labels"]) == len(quantized) == 12
    assert len(figure["cells"]) == 12 * 6
    for linear in quantized:
        assert len(linear.sqnr) == 6
        assert all(value is not None and 25 < value < 80 for value in linear.sqnr)
    assert len({colour for _, _, colour, _ in figure["cells"]}) > 3


def test_the_colours_differ_in_lightness_for_readers_who_do_not_tell_hues_apart(exported: Any) -> None:
    _, report = exported
    figure: Any = heat_map(report)
    lights = []
    for colour, _, _ in figure["legend"]:
        red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour))
        lights.append(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2)  # relative luminance, sRGB about 2.2
    assert lights == sorted(lights)
    assert all(after > 1.3 * before for before, after in pairwise(lights))


def test_calls_run_from_noise_to_picture_with_the_limit_and_the_worst_marked(exported: Any) -> None:
    _, report = exported
    far: Any = sqnr_plot(report)  # the recipe's limit is -100 dB
    assert far["limit"] is None
    near = report.model_copy(update={"verdict": report.verdict.model_copy(update={"min_sqnr": 20.0})})
    plot: Any = sqnr_plot(near)
    height, text = plot["limit"]
    assert text == "limit 20 dB"
    scale = {value: y for y, value in plot["ticks"]}
    assert height == pytest.approx(scale[20])
    worst = min((call for call in report.parity.calls if call.stage != "float-onnx"), key=lambda call: call.sqnr)
    x, y, label, _ = plot["worst"]
    assert label == f"worst: {worst.sqnr:.1f} dB at {worst.timestep:g}"
    line = [tuple(map(float, point.split(","))) for point in plot["lines"][worst.stage].split()]
    assert min(abs(x - a) + abs(y - b) for a, b in line) < 0.2
    timesteps = sorted({call.timestep for call in report.parity.calls})
    assert (plot["noise"], plot["picture"]) == (f"{timesteps[-1]:g}", f"{timesteps[0]:g}")
    first = next(c for c in report.parity.calls if c.stage == worst.stage and c.timestep == timesteps[-1])
    assert line[0][0] == 50
    assert line[0][1] == pytest.approx(scale[20] + (first.sqnr - 20) * (scale[30] - scale[20]) / 10, abs=0.1)
    assert '<line class="limit"' in render_html(near, None)


def test_every_link_leads_to_a_place_of_the_page(exported: Any) -> None:
    out, report = exported
    page = (out / "report.html").read_text(encoding="utf-8")
    targets, places = set(re.findall(r'href="#([^"]+)"', page)), re.findall(r' id="([^"]+)"', page)
    assert len(places) == len(set(places))
    assert targets <= set(places)
    names = [linear.name for linear in report.linears]
    number = names.index("transformer_blocks.0.attn1.to_k")
    row = page[page.index(f'<tr id="linear-{number}">') :].split("</tr>")[0]
    assert f"#heat-{number}" in row
    assert "#scales-transformer_blocks.attn1.to_q" in row  # the table of the input that it shares
    assert f'<a id="heat-{number}" href="#linear-{number}"><text' in page


def test_the_head_states_command_date_and_machine(exported: Any) -> None:
    _, report = exported
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", report.date)
    assert (report.recipe["bits"], report.recipe["format"], report.recipe["bins"]) == ("w8a8", "ort", "per-step")
    assert report.recipe["seed"] == "0"
    assert "target" not in report.recipe  # which this format does not read
    page = render_html(report.model_copy(update={"command": "dq-export -m 'a <b>' -o out"}), None)
    head = page[: page.index('<div class="verdict')]
    for text in (report.date, report.machine, "<b>w8a8</b>", "<pre>dq-export -m &#39;a &lt;b&gt;&#39; -o out</pre>"):
        assert text in head
    assert page.index('class="verdict') < page.index('<dl class="recipe">') < page.index('class="card"')


def test_measured_errors_are_the_linears_own(exported: Any) -> None:
    """A linear's noise over all timesteps is about the noise by which its scaling was chosen."""
    _, report = exported
    for linear in report.linears:
        if linear.error:
            mean = np.mean([10 ** (-value / 10) for value in linear.sqnr if value is not None])
            assert 0.2 < mean / linear.error < 5  # of one reader, and of all readers of the input together


def test_curves_have_a_step_for_every_bin(exported: Any) -> None:
    _, report = exported
    curves: Any = scale_curves(report)
    block = "transformer_blocks"
    expected = {f"{block}.attn1.to_q", f"{block}.attn1.to_out", f"{block}.ff.net.proj", f"{block}.ff.net"}
    assert {curve["kind"] for curve in curves} == expected
    for curve in curves:
        assert len(curve["lines"]) == 2
        for name, points, _, _ in curve["lines"]:
            table = next(table for table in report.tables if table.site == name)
            assert len(points.split()) == 2 * len(table.scales)
            heights = [float(point.split(",")[1]) for point in points.split()]
            assert min(heights) == 22  # the greatest scale touches the top
            assert float(points.split()[0].split(",")[0]) == 290  # timestep 0 is at the right


def test_the_page_needs_nothing_from_outside(exported: Any) -> None:
    out, report = exported
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    headings = ("Every linear at every timestep", "Scale tables", "four times their difference", "Left float", "Kernels")
    for heading in headings:
        assert heading in page
    assert "The search that found" not in page
    bare = report.model_copy(update={"parity": None, "audit": None, "tables": [], "measured_at": [], "verdict": None})
    assert sqnr_plot(bare) == {}
    assert heat_map(bare) == {}
    assert "Every linear at every timestep" not in render_html(bare, None)


def test_pictures_of_float_engine_and_difference_stand_in_three_rows(tmp_path: Path) -> None:
    from PIL import Image

    rows = [np.full((2, 1, 16, 16), value, dtype=np.float32) for value in (-1, 0, 1)]
    save_pictures(tmp_path / "p.png", rows)
    pixels = np.asarray(Image.open(tmp_path / "p.png"))
    assert pixels.shape[0] * 2 == pixels.shape[1] * 3
    third = len(pixels) // 3
    assert [int(pixels[i * third + third // 2, third // 2]) for i in range(3)] == [0, 128, 255]


def test_large_pictures_are_halved_and_those_that_are_not_finite_are_black(tmp_path: Path) -> None:
    from PIL import Image

    checks = np.indices((1024, 768)).sum(axis=0) % 2 * np.float32(2) - 1
    rows = [np.broadcast_to(value, (1, 3, 1024, 768)) for value in (checks, np.float32(np.nan))]
    save_pictures(tmp_path / "p.png", rows)
    pixels = np.asarray(Image.open(tmp_path / "p.png"))
    assert pixels.shape == (2 * (512 + 2), 384 + 2, 3)
    assert (pixels[1:513, 1:-1] == 128).all()
    assert (pixels[515:-1, 1:-1] == 0).all()


def picture(*parts: str) -> bytes:
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">' + "".join(parts) + "</svg>").encode()


def test_the_page_forbids_scripts_and_outside_resources(exported: Any) -> None:
    page = (exported[0] / "report.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy.split("; ") == [
        "default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", "base-uri 'none'", "form-action 'none'"
    ]  # fmt: skip
    assert page.index("Content-Security-Policy") < page.index("<style>"), "it holds for what comes after it"


def test_a_searchs_picture_is_an_image_in_which_nothing_runs(exported: Any) -> None:
    _, report = exported
    svg = picture("<script>alert(1)</script>", '<g onload="alert(2)"/>')
    page = render_html(report, None, svg)
    assert "alert" not in page
    (source,) = re.findall(r'<img class="front"[^>]* src="data:image/svg\+xml;base64,([^"]*)">', page)
    assert base64.b64decode(source) == svg


def test_what_a_picture_is_drawn_of_stands_under_it(exported: Any) -> None:
    out, report = exported
    assert report.drawn == ["0", "1"], "class labels, in turn"
    prompts = report.model_copy(update={"drawn": ["a seven", "<b>a & b</b>"]})
    page = render_html(prompts, (out / "parity" / "pictures.png").read_bytes())
    captions = "<span>a seven</span><span>&lt;b&gt;a &amp; b&lt;/b&gt;</span>"
    assert f'<figcaption style="grid-template-columns: repeat(2, 1fr)">{captions}</figcaption>' in page
    assert page.index("data:image/png") < page.index(captions)


def test_names_and_paths_are_text_on_the_page(exported: Any) -> None:
    _, report = exported
    bad = "<script>x</script>\x1b[31m\u202e"
    linear = report.linears[0].model_copy(update={"name": bad, "rule": bad, "reason": bad, "scaling": bad})
    page = render_html(report.model_copy(update={"model": bad, "linears": [linear, *report.linears[1:]], "machine": bad}), None)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert r"&lt;script&gt;x&lt;/script&gt;\x1b[31m\u202e" in page


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, secret: path.symlink_to(secret), "cannot be read"),
        (lambda path, secret: path.mkdir(), "Is a directory"),
        (lambda path, secret: path.write_bytes(b"\xff\xfe"), "no picture that starts with"),
        (lambda path, secret: path.write_text("<html>"), "no picture that starts with"),
        (lambda path, secret: os.mkfifo(path), "not a regular file"),
        (lambda path, secret: (path.touch(), os.truncate(path, 1 << 40)), "larger than the"),
    ],
    ids=["link", "folder", "not-utf-8", "html", "pipe", "huge"],
)
def test_a_file_that_is_not_a_picture_beside_a_recipe_is_refused_before_work(make: Any, message: str, tmp_path: Path) -> None:
    """The folder of somebody else's recipe: the text of a file that search.svg links to must not end in the report."""
    (tmp_path / "secret").write_text("<svg secret")
    (tmp_path / "recipe.yaml").write_text("model: dit-digits\n")
    make(tmp_path / "search.svg", tmp_path / "secret")
    with pytest.raises(OutputError, match=rf"search\.svg: .*{message}"):
        run(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "out", Options(front=tmp_path / "search.svg"))
    assert not (tmp_path / "out").exists()
    assert read_picture(tmp_path / "none.svg") is None


def test_the_verdict_stands_on_top(exported: Any) -> None:
    out, report = exported
    page = (out / "report.html").read_text(encoding="utf-8")
    assert report.verdict.outcome == "passed"
    assert '<div class="verdict passed">' in page
    assert page.index('class="verdict') < page.index('class="card"')
    assert "the recipe requires -100 dB" in page
    failed = report.verdict.model_copy(
        update={"outcome": "failed", "reasons": ["engine: 5 < 20"], "advice": "Try --rounding gptq."}
    )
    page = render_html(report.model_copy(update={"verdict": failed}), None)
    assert '<div class="verdict failed">' in page
    assert "<p>engine: 5 &lt; 20</p>" in page
    assert "<p>Try --rounding gptq.</p>" in page


def test_the_first_card_is_the_share_of_all_gemms(exported: Any) -> None:
    out, report = exported
    page = (out / "report.html").read_text(encoding="utf-8")
    cards = re.findall(r'<div class="card"><b>([^<]*)</b>([^<]*)', page)
    assert cards[0] == (f"{100 * report.audit.integer_share:.1f} %", "of all GEMM FLOPs run in low precision")
    assert report.audit.integer_share < 0.9
    assert cards[1] == ("100.0 %", "of those that the recipe quantizes")


def test_the_page_states_what_drew_the_pictures_and_that_a_plan_was_not_run(exported: Any) -> None:
    out, report = exported
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "drawn by PyTorch, by ONNX Runtime&#39;s CPU provider, and four" in page
    assert "not run here" not in page
    calls = tuple(call for call in report.parity.calls if call.stage != "engine")
    planned = report.model_copy(update={"engine": "TensorRT-RTX", "parity": replace(report.parity, calls=calls, trajectories=())})
    page = render_html(planned, b"png")
    assert "drawn by PyTorch, by the Q/DQ graph on ONNX Runtime&#39;s CPU provider, operator by operator, and four" in page
    assert "Plan not run here: TensorRT-RTX needs its GPU." in page


def test_an_output_that_is_not_finite_still_makes_a_report_that_loads(exported: Any) -> None:
    _, report = exported
    missing = replace(report.parity.calls[-1], sqnr=-200.0, cosine=0.0, max_error=None)
    broken = report.model_copy(update={"parity": replace(report.parity, calls=(*report.parity.calls[:-1], missing))})
    assert Report.model_validate_json(broken.model_dump_json()) == broken
    assert "not finite" in render_html(broken, None)


def test_the_page_holds_in_a_browser(exported: Any, tmp_path: Path) -> None:
    """Chromium itself: the verdict is drawn, the search's picture is shown, and its script does not run."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    _, report = exported
    svg = picture("<script>document.title='owned'</script>", '<rect width="9" height="9" onload="alert(1)"/>')
    probe = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    page = render_html(report.model_copy(update={"model": probe}), None, svg)
    # The policy must hold even against what escaping would let through.
    (tmp_path / "p.html").write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    result = subprocess.run([*words, f"file://{tmp_path / 'p.html'}"], capture_output=True, text=True, timeout=120, check=True)
    assert re.findall(r"<title>(.*?)</title>", result.stdout)[0].startswith("dq-export: ")
