"""Find the pass and the linear at which a finished export's graph departs from PyTorch, by replaying the passes."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.documents import shown_path
from dq_export.core.plugins import fault_of_plugin
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import RecipeError
from dq_export.deploy.backend import BackendError, Feed, Float32
from dq_export.deploy.backends import backend_of
from dq_export.deploy.onnxruntime.cpu import OrtEngine, open_graph
from dq_export.deploy.packages import require_packages
from dq_export.deploy.parity import difference
from dq_export.deploy.replay import polygraphy_command, save_replay
from dq_export.passes.base import GraphPass
from dq_export.passes.legalise.widen_floats import WidenFloats
from dq_export.passes.pipeline import canonical_passes, with_plugins

from ..finished_folder import MODEL, REPORT, FinishedFolder
from ..ledger import RECIPE
from ..output_folder import OutputError, locked, move
from ..stages.calibrate import CALIBRATION
from ..stages.distill import decided
from ..stages.quantize import quantize_graph
from .subgraph import cut, first_broken

FOLDER = "bisect"
"""In the output folder: the smallest failing graph and its calls."""
FLOAT = "float graph"


@dataclass(frozen=True, kw_only=True)
class Step:
    """The graph after a pass.

    Args:
        name: the name of the pass, or of several passes if ONNX Runtime cannot run the graphs between them.
        sqnr: SQNR of the worst recorded call, dB.
        call: the index of this call.
    """

    name: str
    sqnr: float
    call: int


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """The result of replaying the passes.

    Args:
        steps: the float graph and each pass, up to the first pass after which a call falls below the limit.
        limit: the least SQNR of every call, dB.
        linear: the first linear, in execution order, whose result this pass moves beyond the limit; empty if there is none.
        command: the polygraphy command that shows the failure when it is run in the output folder; empty without a failure.
    """

    steps: tuple[Step, ...]
    limit: float
    linear: str = ""
    command: str = ""

    @property
    def broken(self) -> Step | None:
        """The step after which a call falls below the limit."""
        return self.steps[-1] if self.steps[-1].sqnr < self.limit else None


def bisect_passes(out: Path, min_sqnr: float | None, progress: Advance = unwatched) -> Bisection:
    """Replay the passes of a finished export and find the first that breaks parity; the failing graph goes to `out/bisect`.

    Args:
        min_sqnr: the least SQNR of every recorded call, dB; None for the recipe's limit.

    Raises:
        OutputError: `out` does not hold a complete export, or it is damaged.
        RecipeError: its recipe is damaged, or `min_sqnr` is not finite.
        BackendError: a library is missing.
        GraphError: a pass refuses the graph.
    """
    if min_sqnr is not None and not math.isfinite(min_sqnr):
        raise RecipeError(f"--min-sqnr {min_sqnr}: expected a number of dB")
    require_packages(("onnxruntime", "polygraphy", "onnx_graphsurgeon"), "dq-export bisect")
    finished = FinishedFolder.open(out, RECIPE, MODEL, REPORT, "float/model.onnx", CALIBRATION)
    recipe = finished.recipe()
    feeds, references = finished.calls()
    calibration, backend = CalibrationResult.load(out / decided(recipe)), backend_of(recipe)
    legalise = backend.legalise(shared=recipe.timesteps == "shared", result=calibration) if backend else ()
    assigned = finished.assigned()
    bisector = Bisector(
        out=out,
        passes=with_plugins((*canonical_passes(calibration, assigned), *legalise), calibration, assigned),
        calibration=calibration,
        feeds=feeds,
        references=references,
        limit=recipe.min_sqnr if min_sqnr is None else min_sqnr,
    )
    with locked(out), tempfile.TemporaryDirectory(dir=out) as folder:
        try:
            return bisector.run(Path(folder), progress)
        except KeyError as error:
            if fault_of_plugin(error):
                raise
            raise OutputError(f"{shown_path(out)}: float/model.onnx has {error}, which {MODEL} has not; export again") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Bisector:
    """Passes that are applied one by one to the float graph of `out`, and the calls that judge the graph after each.

    Args:
        calibration: what the passes apply.
        feeds, references: the recorded calls and PyTorch's results.
        limit: dB that every call must keep.
    """

    out: Path
    passes: Sequence[GraphPass]
    calibration: CalibrationResult
    feeds: Sequence[Feed]
    references: Sequence[Float32]
    limit: float

    def run(self, folder: Path, progress: Advance = unwatched) -> Bisection:
        """Stop at the first pass that breaks parity, and cut out what fails. `folder`: for the graphs."""
        steps: list[Step] = []
        names, before = [FLOAT, *(item.name for item in self.passes)], None
        first = 0  # the first pass since the last graph that ran
        for number in range(len(names)):
            graph = folder / str(number) / MODEL
            graph.parent.mkdir()
            # For ONNX Runtime's CPU provider, which has no bfloat16; of a graph without any it changes nothing.
            quantize_graph(self.out / "float" / MODEL, graph, (*self.passes[:number], WidenFloats()))
            progress(number + 1, len(names), "graphs")
            try:
                engine = open_graph(graph, optimize=False, prepack=False)
            except BackendError:
                if number == len(self.passes):
                    raise
                shutil.rmtree(graph.parent)  # a form that a later pass replaces, such as a table of float8 zero points
                continue
            steps.append(self._measured(", ".join(names[first : number + 1]), engine))
            if steps[-1].sqnr < self.limit:
                linear = self._located(steps[-1], before, graph) if before else ""
                command = polygraphy_command(self.limit, f"{FOLDER}/{MODEL}", FOLDER) if linear else ""
                return Bisection(steps=tuple(steps), limit=self.limit, linear=linear, command=command)
            if before:
                shutil.rmtree(before.parent)
            first, before = number + 1, graph
        return Bisection(steps=tuple(steps), limit=self.limit)

    def _measured(self, name: str, engine: OrtEngine) -> Step:
        wrong = next(filter(None, map(engine.misfit, self.feeds)), "")
        if wrong:
            raise OutputError(f"{shown_path(self.out)}: the float graph does not take the recorded calls: {wrong}; export again")
        rows = []
        for feed, reference in zip(self.feeds, self.references, strict=True):
            result = engine(feed)
            if result.shape != reference.shape:
                raise OutputError(
                    f"{shown_path(self.out)}: the float graph gives {list(result.shape)} for a recorded call, and "
                    f"{list(reference.shape)} was recorded; export again"
                )
            rows.append(difference(reference, result).sqnr)
        call = int(np.argmin(rows))
        return Step(name=name, sqnr=rows[call], call=call)

    def _located(self, step: Step, before: Path, after: Path) -> str:
        """The first linear that the step breaks; what fails of it goes to `out/bisect`. Empty where no linear does."""
        feed, folded = self.feeds[step.call], self.calibration if "fold_scaling" in step.name.split(", ") else None
        graphs = (before, after)
        broken = first_broken(graphs, feed, self.limit, folded)
        if broken is None:
            return ""
        target = after.parent / FOLDER
        target.mkdir()
        save_replay(target, *cut(graphs, broken, feed, self.limit, target / MODEL))
        move(target, self.out / FOLDER)
        return broken.linear
