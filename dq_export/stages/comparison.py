"""Parity of an output folder's graphs with what PyTorch computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dq_export.core.recipe import Recipe
from dq_export.core.scales import TimestepBins
from dq_export.deploy.backend import Backend, Engine, Feed
from dq_export.deploy.onnxruntime.cpu import open_graph
from dq_export.deploy.parity import CallParity, compare_calls, difference, worst
from dq_export.deploy.triton.serving.model import images_of

from ..families.reference import Float32, Reference
from ..finished_folder import engine_of
from ..report.report import CallReport, ParityReport, StageResult, TrajectoryReport
from .recording import Recording, draw, feed_of


def stages(folder: Path, portable: Path, backend: Backend | None) -> dict[str, Callable[[], Engine]]:
    """How to load the float graph, the Q/DQ graph run node by node, and, where it runs on this machine, the engine."""
    found: dict[str, Callable[[], Engine]] = {
        # Run a few times only: to transpose and pack three gigabytes of weights costs more than it saves.
        "float-onnx": lambda: open_graph(folder / "float" / "model.onnx", prepack=False),
        "qdq-onnx": lambda: open_graph(portable, optimize=False),
    }
    if backend and backend.runs:
        found["engine"] = lambda: backend.load(engine_of(folder))
    return found


def verify(
    reference: Reference,
    recipe: Recipe,
    bins: TimestepBins,
    folder: Path,
    target: Path,
    progress: Callable[[int, int], None],
    backend: Backend | None,
) -> StageResult:
    """Compare every stage with the recording call by call, and the last one over whole trajectories from the same noise.

    One stage is in memory at a time. Writes, for pictures of 1 or 3 channels, `pictures.png` to `target`.

    Args:
        reference: samples; its network is not called.
    """
    recording = Recording.load(folder / "parity")
    target.mkdir(parents=True, exist_ok=True)
    model = folder / "model.onnx"
    portable = backend.portable(model, target) if backend else model
    loaders = stages(folder, portable, backend)
    last = list(loaders)[-1]
    calls = len(recording.feeds)
    total = calls * len(loaders) + len(reference.timesteps(recipe.steps)) * -(-recipe.parity_size // reference.batch)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    rows: list[CallParity] = []
    indices = bins.index([float(np.asarray(feed["timestep"]).ravel()[0]) for feed in recording.feeds]).tolist()
    pictures = recording.pictures
    for name, load in loaders.items():
        engine = load()
        rows += compare_calls(name, engine, recording.feeds, recording.outputs, indices, count)
        if name == last:
            pictures = draw(reference, _counted(engine, recipe, count), recipe)
        del engine
    low = worst(rows, last)
    apart = np.clip(4 * (pictures - recording.pictures), -1, 1)
    save_pictures(target / "pictures.png", [recording.pictures, pictures, apart])
    trajectory = _trajectory(last, recording.pictures, pictures)
    parity = ParityReport(calls=[_call(row) for row in rows], trajectories=[trajectory])
    summary = f"{last} at worst {low.difference.sqnr:.1f} dB (timestep {low.timestep:g}), trajectory {trajectory.sqnr:.1f} dB"
    return StageResult(summary=summary, parity=parity)


def save_pictures(path: Path, rows: list[Float32]) -> bool:
    """One row of pictures for each array float32[N, 1 or 3, H, W] in [-1, 1], enlarged; False for other channels."""
    from PIL import Image

    if rows[0].shape[1] not in (1, 3):
        return False
    framed = [np.pad(images_of(row), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96) for row in rows]
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in framed])
    factor = max(1, 64 // rows[0].shape[-1])
    large = grid.repeat(factor, axis=0).repeat(factor, axis=1)
    Image.fromarray(large[..., 0] if large.shape[-1] == 1 else large).save(path, format="PNG")
    return True


def _counted(engine: Engine, recipe: Recipe, count: Callable[[], None]) -> Callable[[Feed], Float32]:
    def call(feed: Feed) -> Float32:
        output = engine(feed_of(feed, recipe))
        count()
        return output

    return call


def _trajectory(stage: str, exact: Float32, found: Float32) -> TrajectoryReport:
    whole = difference(exact, found)
    each = [difference(a, b).sqnr for a, b in zip(exact, found, strict=True)]
    return TrajectoryReport(
        stage=stage,
        samples=len(exact),
        sqnr=whole.sqnr,
        worst_sqnr=min(each),
        cosine=whole.cosine,
        max_error=_finite(whole.max_error),
    )


def _call(row: CallParity) -> CallReport:
    d = row.difference
    return CallReport(
        stage=row.stage, timestep=row.timestep, bin=row.bin, sqnr=d.sqnr, cosine=d.cosine, max_error=_finite(d.max_error)
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
