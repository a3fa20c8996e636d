"""How fast an output folder's engine is, and beside what."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dq_export.calibration.recipe import Recipe
from dq_export.deploy.backend import Backend, Feed, Float32
from dq_export.deploy.latency import measure
from dq_export.deploy.ort import ORT

from .families.reference import ModelError
from .report import EngineReport, LatencyReport

BATCH = 2
"""One guided picture."""
Network = Callable[[Feed], Float32]


def bench(folder: Path, backend: Backend, rounds: int = 15) -> LatencyReport:
    """Latency of the engine against the float ONNX graph, interleaved, on parity's first input."""
    feed = _feed(folder)
    float_model, model = folder / "float" / "model.onnx", folder / "model.onnx"
    engines: dict[str, Network] = {"float": ORT.load(float_model), "engine": backend.load(model, batch=BATCH)}
    taken = measure(engines, feed, rounds=rounds)
    return _report(feed, {name: EngineReport(median_ms=t.median, least_ms=t.least, memory_mb=None) for name, t in taken.items()})


def bench_all(folder: Path, backend: Backend, recipe: Recipe, rounds: int = 15) -> LatencyReport:
    """Like `bench`, with PyTorch in float32 and bfloat16 beside them, memory, and time by operator.

    Args:
        recipe: names the model that the folder was exported from; without it PyTorch is left out, with the reason.
    """
    from .families.source import load, pin

    feed = _feed(folder)
    float_model, quantized = folder / "float" / "model.onnx", folder / "model.onnx"
    skipped: dict[str, str] = {}
    loaders: dict[str, Callable[[], Network]] = {}
    try:
        reference = load(pin(recipe)[1])
        loaders["torch fp32"] = lambda: reference.forward
        loaders["torch bf16"] = lambda: reference.in_dtype("bf16")
    except ModelError as error:
        skipped["torch"] = str(error)
    loaders["float"] = lambda: ORT.load(float_model)
    loaders["engine"] = lambda: backend.load(quantized, batch=BATCH)
    engines, memory = {}, {}
    for name, make in loaders.items():
        before = _resident()
        engines[name] = make()
        engines[name](feed)
        memory[name] = _resident() - before
    taken = measure(engines, feed, rounds=rounds)
    del engines
    measured = {name: EngineReport(median_ms=t.median, least_ms=t.least, memory_mb=memory[name]) for name, t in taken.items()}
    profile = {"float": ORT.profile(float_model, feed), "engine": backend.profile(quantized, feed)}
    return _report(feed, measured).model_copy(update={"profile": profile, "skipped": skipped})


def losing(report: LatencyReport) -> list[str]:
    """The engine's operators that take longer than the same ones of the float graph, the worst first."""
    before, after = (report.profile.get(name, {}) for name in ("float", "engine"))
    more = {name: spent - before.get(name, 0.0) for name, spent in after.items()}
    return [f"{name} +{spent:.2f} ms" for name, spent in sorted(more.items(), key=lambda item: -item[1]) if spent > 0]


def _feed(folder: Path) -> Feed:
    from dq_export.deploy.parity import load_replay

    feeds, _ = load_replay(folder / "parity")
    return {name: value[:BATCH] for name, value in feeds[0].items()}


def _report(feed: Feed, engines: dict[str, EngineReport]) -> LatencyReport:
    float_ms, engine_ms = engines["float"].median_ms, engines["engine"].median_ms
    batch = len(feed["hidden_states"])
    return LatencyReport(
        batch=batch, float_ms=float_ms, engine_ms=engine_ms, ratio=float_ms / engine_ms, engines=engines, profile={}, skipped={}
    )


def _resident() -> float:
    """MB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6
