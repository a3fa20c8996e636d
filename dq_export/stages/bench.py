"""The stage `bench`: how fast the engine is, beside the float graph on the same runtime and beside PyTorch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_export.core.network import batch_of
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.backend import Backend, BackendError, Feed
from dq_export.passes.sizes import unbatched_inputs

from ..families.float_graph import load
from ..families.reference import ModelError
from ..finished_folder import engine_of
from ..ledger import Result
from ..report.report import EngineReport, LatencyReport
from ..timing import ROUNDS, Timed, Timing, time_engines, timed
from .build import BUILD
from .float_graph import FLOAT
from .stage import Context, Stage

BATCH = 2
"""Rows of the timed call at most: one guided picture. An unguided picture alone has one row."""
PYTORCH = {"torch fp32": "fp32", "torch bf16": "bf16"}


class Benched(Result):
    """What was timed."""

    latency: LatencyReport


@dataclass(frozen=True)
class Bench(Stage[Benched]):
    """Times the engine and the float graph in turn."""

    name: str = "bench"
    result: type[Benched] = Benched
    needs: tuple[Stage[Any], ...] = (BUILD, FLOAT)

    def applies(self, context: Context) -> bool:
        """Where there is an engine that this machine runs."""
        return context.backend is not None and BUILD in context.results and context.backend.runs

    def text(self, context: Context) -> str:
        """What is timed."""
        return "engine and float graph in turn"

    def run(self, context: Context, target: Path) -> Benched:
        """Time both; nothing is written."""
        assert context.backend is not None  # see `applies`
        latency = bench(context.folder, context.backend, context.progress.advance)
        return Benched(summary=f"{latency.ratio:.2f}x the speed of {latency.baseline}", latency=latency)


BENCH = Bench()


def bench(
    folder: Path, backend: Backend, progress: Advance = unwatched, *, recipe: Recipe | None = None, rounds: int = ROUNDS
) -> LatencyReport:
    """Latency of the engine and of the float graph on the engine's own runtime, in turn, on parity's first input.

    Args:
        recipe: names the model that the folder was exported from, to time PyTorch on the engine's device in float32 and
            bfloat16, and operators, too; None: neither.

    Raises:
        BackendError: the float graph or the engine cannot be loaded or run.
        GraphError: the float graph is damaged.
    """
    feed = _feed(folder)
    rows = batch_of(feed)
    pytorch, skipped = _pytorch(recipe, rows, folder, backend.device) if recipe else ([], {})
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        baseline = backend.baseline(folder / "float" / "model.onnx", load, Path(temporary))
        built = {"float": baseline, "engine": engine_of(folder)}
        engines = [timed(name, backend, engine, rows, profile=recipe is not None) for name, engine in built.items()]
        timings = time_engines([*pytorch, *engines], feed, progress, rounds)
    for name in built:
        if timings[name].error:
            raise BackendError(timings[name].error)
    skipped |= {name: timing.error for name, timing in timings.items() if timing.error}
    return _report(feed, timings, backend, skipped)


def losing(report: LatencyReport) -> list[str]:
    """The engine's operators that take longer than the same ones of the float graph, the worst first."""
    before, after = (report.profile.get(name, {}) for name in ("float", "engine"))
    slower = {name: time - before.get(name, 0.0) for name, time in after.items()}
    return [f"{name} +{time:.2f} ms" for name, time in sorted(slower.items(), key=lambda item: -item[1]) if time > 0]


def _feed(folder: Path) -> Feed:
    from dq_export.deploy.replay import load_replay

    feeds, _ = load_replay(folder / "parity")
    shared = unbatched_inputs(load(folder / "float" / "model.onnx"))
    return {name: value if name in shared else value[:BATCH] for name, value in feeds[0].items()}


def _pytorch(recipe: Recipe, rows: int, folder: Path, device: str) -> tuple[list[Timed], dict[str, str]]:
    """PyTorch's networks on the engine's device; none, with the reason, where the checkpoint is gone."""
    from ..families.source import pin

    try:
        r, _ = pin(recipe)
    except (ModelError, RecipeError) as error:
        return [], {"torch": str(error)}
    files, place = (r.revision or "", r.variant or ""), str(folder.resolve())

    def network(name: str, dtype: str) -> Timed:
        runs_on = ("torch", None, dtype)
        lora = r.lora or ()
        return Timed(name=name, model=r.model, folder=place, runs_on=runs_on, batch=rows, files=files, lora=lora, device=device)

    return [network(name, dtype) for name, dtype in PYTORCH.items()], {}


def _report(feed: Feed, timings: dict[str, Timing], backend: Backend, skipped: dict[str, str]) -> LatencyReport:
    engines = {
        name: EngineReport(median_ms=timing.median, least_ms=min(timing.milliseconds), memory_mb=timing.memory_mb)
        for name, timing in timings.items()
        if not timing.error
    }
    float_ms, engine_ms = engines["float"].median_ms, engines["engine"].median_ms
    return LatencyReport(
        batch=batch_of(feed),
        baseline=f"the float graph on {backend.title} in {backend.dtype}",
        float_ms=float_ms,
        engine_ms=engine_ms,
        ratio=float_ms / engine_ms,
        engines=engines,
        profile={name: timings[name].profile for name in ("float", "engine")},
        skipped=skipped,
    )
