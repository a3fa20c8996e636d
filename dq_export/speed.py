"""How fast an output folder's engine is."""

from __future__ import annotations

from pathlib import Path

from dq_export.deploy.backend import Backend
from dq_export.deploy.latency import measure
from dq_export.deploy.ort import ORT

from .report import LatencyReport

BATCH = 2
"""One guided picture."""


def bench(folder: Path, backend: Backend, rounds: int = 15) -> LatencyReport:
    """Latency of the engine against the float ONNX graph, interleaved, on parity's first input."""
    from dq_export.deploy.parity import load_replay

    feeds, _ = load_replay(folder / "parity")
    feed = {name: value[:BATCH] for name, value in feeds[0].items()}
    batch = len(feed["hidden_states"])
    engines = {
        "float": ORT.load(folder / "float" / "model.onnx", batch=batch),
        "engine": backend.load(folder / "model.onnx", batch=batch),
    }
    taken = measure(engines, feed, rounds=rounds)
    return LatencyReport(
        batch=batch,
        float_ms=taken["float"].median,
        engine_ms=taken["engine"].median,
        ratio=taken["float"].median / taken["engine"].median,
    )
