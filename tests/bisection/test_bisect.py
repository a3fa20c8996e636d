"""`dq-export bisect`: which pass and which linear break parity, and the part of the graph that shows it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from dq_export.bisection.bisect import Bisection, Bisector, bisect_passes
from dq_export.bisection.subgraph import first_broken
from dq_export.cli.app import app
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.replay import load_replay, save_replay
from dq_export.finished_folder import FinishedFolder
from dq_export.output_folder import OutputError
from dq_export.passes.base import GraphPass, PassReport
from dq_export.passes.match import linears
from dq_export.passes.names import SITE, Property
from dq_export.passes.pipeline import canonical_passes, factoring_passes
from dq_export.pipeline import run
from dq_export.stages.quantize import quantize_graph

LIMIT = 36.0
"""dB. The intact graph of the tiny model keeps about 45."""
BROKEN = Property("test.broken")
QUICK: dict[str, Any] = {"calib_size": 2, "steps": 4, "parity_size": 1, "scaling": "smooth", "shift": True}
Q, V, OUT = (f"transformer_blocks.1.attn1.{name}" for name in ("to_q", "to_v", "to_out.0"))


@dataclass(frozen=True, kw_only=True)
class ReverseWeight(GraphPass):
    """Breaks one linear: its outputs have another's weights."""

    name: ClassVar[str] = "reverse_weight"
    linear: str

    def rewrite(self, model: ir.Model) -> PassReport:
        linear = linears(model)[self.linear]
        if BROKEN.read(linear.gemm):
            return PassReport(name=self.name)
        linear.change_weight(lambda weight: weight[::-1])
        BROKEN.write(linear.gemm, "yes")
        return PassReport(name=self.name, changed=(self.linear,))


@dataclass(frozen=True, kw_only=True)
class StretchScale(GraphPass):
    """Breaks one site: its DequantizeLinear has another scale than its QuantizeLinear."""

    name: ClassVar[str] = "stretch_scale"
    site: str

    def rewrite(self, model: ir.Model) -> PassReport:
        node = next(node for node in model.graph if node.op_type == "DequantizeLinear" and SITE.read(node) == self.site)
        if BROKEN.read(node):
            return PassReport(name=self.name)
        scale = node.inputs[1]
        assert scale is not None
        twice = ir.node("Mul", [scale, scale])
        twice.outputs[0].dtype, twice.outputs[0].shape = scale.dtype, scale.shape
        model.graph.insert_before(node, twice)
        node.replace_input_with(1, twice.outputs[0])
        BROKEN.write(node, "yes")
        return PassReport(name=self.name, changed=(self.site,))


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bisected") / "out"
    run(Recipe.parse({"model": str(tiny_folder), **QUICK}, "test"), out, until="verify")
    return out


def replayed(out: Path, folder: Path, change: Callable[[list[GraphPass]], list[GraphPass]]) -> Bisection:
    """The canonical and the factoring passes, changed."""
    finished = FinishedFolder.open(out)
    calibration = CalibrationResult.load(out / "calibration.safetensors")
    feeds, references = finished.calls()
    passes = [*canonical_passes(calibration, finished.assigned()), *factoring_passes(calibration)]
    bisector = Bisector(
        out=out, passes=change(passes), calibration=calibration, feeds=feeds, references=references, limit=LIMIT
    )  # fmt: skip
    return bisector.run(folder)


def behind(name: str, broken: GraphPass) -> Callable[[list[GraphPass]], list[GraphPass]]:
    def change(passes: list[GraphPass]) -> list[GraphPass]:
        place = 1 + [item.name for item in passes].index(name)
        return [*passes[:place], broken, *passes[place:]]

    return change


def polygraphy(out: Path, command: str) -> int:
    words = shlex.split(command)
    assert words[0] == "polygraphy"
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words[1:]], cwd=out, capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    ("place", "broken", "linear", "operators"),
    [
        ("merge_duplicates", ReverseWeight(linear=V), V, {"MatMul", "Add"}),
        ("fold_scaling", ReverseWeight(linear=OUT), OUT, {"MatMul", "Add"}),
        ("insert_qdq", StretchScale(site=Q), Q, None),
        ("factor_scale", StretchScale(site=OUT), OUT, None),
    ],
)
def test_the_pass_and_the_linear_are_named_and_the_part_fails(
    place: str, broken: GraphPass, linear: str, operators: set[str] | None, finished: Path, tmp_path: Path
) -> None:
    bisection = replayed(finished, tmp_path, behind(place, broken))
    assert bisection.broken is not None
    assert (bisection.broken.name, bisection.linear) == (broken.name, linear)
    assert [step.name for step in bisection.steps][-2:] == [place, broken.name]
    assert all(step.sqnr > LIMIT for step in bisection.steps[:-1])
    part = onnx.load(finished / "bisect" / "model.onnx")
    onnx.checker.check_model(part)
    used = {node.op_type for node in part.graph.node}
    assert used == operators if operators else {"QuantizeLinear", "DequantizeLinear", "MatMul"} <= used
    assert len(part.graph.node) < 25
    assert "Softmax" not in used, "nothing of what comes before"
    assert polygraphy(finished, bisection.command) == 1
    assert polygraphy(finished, bisection.command.replace(f" {LIMIT:.2f}", " -100.00")) == 0, (
        "the files are what the command needs"
    )


def test_an_intact_export_passes_every_step(finished: Path) -> None:
    bisection = bisect_passes(finished, None)
    assert bisection.broken is None
    assert (bisection.linear, bisection.command) == ("", "")
    names = [step.name for step in bisection.steps]
    assert names[:2] == ["float graph", "fold_transpose"]
    assert {"quantize_weights", "insert_qdq", "unsign_codes"} < set(names)
    exact = {step.name: step.sqnr for step in bisection.steps}
    assert exact["fold_scaling"] > 80 > exact["insert_qdq"]


def test_folded_results_are_distinguished_from_broken_ones(finished: Path, tmp_path: Path) -> None:
    """An operator that absorbs a scaling has other results, which are right."""
    calibration = CalibrationResult.load(finished / "calibration.safetensors")
    folder = FinishedFolder.open(finished)
    passes = canonical_passes(calibration, folder.assigned())
    place = [item.name for item in passes].index("fold_scaling")
    graphs = (tmp_path / "before" / "model.onnx", tmp_path / "after" / "model.onnx")
    for path, count in zip(graphs, (place, place + 1), strict=True):
        path.parent.mkdir()
        quantize_graph(finished / "float" / "model.onnx", path, passes[:count])
    feed = folder.calls()[0][0]
    assert first_broken(graphs, feed, 90.0, calibration) is None
    unaware = first_broken(graphs, feed, 90.0)
    assert unaware is not None
    assert unaware.linear == "transformer_blocks.0.norm1.linear"


def test_the_command_line_names_the_pass(finished: Path) -> None:
    result = CliRunner().invoke(app, ["bisect", str(finished)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "insert_qdq" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_limit_that_the_codes_do_not_keep_names_the_linear(finished: Path) -> None:
    result = CliRunner().invoke(app, ["bisect", str(finished), "--min-sqnr", "75"], env={"COLUMNS": "80"})
    assert result.exit_code == 4, result.output
    assert "parity breaks in pass quantize_weights, at linear" in " ".join(result.stdout.split())
    command = next(line for line in result.stdout.splitlines() if line.startswith("polygraphy run bisect/model.onnx"))
    assert polygraphy(finished, command) == 1


def test_a_limit_that_is_not_a_number_is_refused(finished: Path) -> None:
    with pytest.raises(RecipeError, match="--min-sqnr nan: expected a number of dB"):
        bisect_passes(finished, float("nan"))


def test_a_folder_without_its_recording_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(finished, copy)
    (copy / "parity" / "inputs.json").unlink()
    with pytest.raises(OutputError, match=r"no parity/inputs\.json, nothing to compare with"):
        bisect_passes(copy, None)
    (copy / "calibration.safetensors").unlink()
    with pytest.raises(OutputError, match=r"no calibration\.safetensors"):
        bisect_passes(copy, None)


def test_graphs_that_onnx_runtime_does_not_run_are_skipped(tiny_folder: Path, tmp_path: Path) -> None:
    """ONNX Runtime takes no graph with a table of float8 zero points; factor_scale replaces the table."""
    out = tmp_path / "out"
    fp8 = {"model": str(tiny_folder), **QUICK, "format": "trt", "bits": "fp8"}
    run(Recipe.parse(fp8, "test"), out, until="verify")
    bisection = bisect_passes(out, 45.0)
    assert bisection.broken is not None
    assert bisection.broken.name == "insert_qdq, widen_codes, quantize_attention, factor_scale"
    assert bisection.linear
    assert polygraphy(out, bisection.command) == 1


def test_a_recorded_result_of_another_shape_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(finished, copy)
    feeds, references = load_replay(copy / "parity")
    save_replay(copy / "parity", feeds, [references[0][:1], *references[1:]])
    with pytest.raises(OutputError, match=r"gives \[2, 2, 8, 8\] for a recorded call, and \[1, 2, 8, 8\] was recorded; export"):
        bisect_passes(copy, None)


def test_a_file_where_the_failing_part_goes_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("bisect"))
    (copy / "bisect").write_text("mine")
    with pytest.raises(OutputError, match="bisect: a file where an export has a folder"):
        bisect_passes(copy, None)
