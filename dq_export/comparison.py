"""Parity and speed of an output folder's graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dq_export.calibration.artifacts import CalibrationResult
from dq_export.calibration.recipe import Recipe
from dq_export.deploy.backend import Engine, Feed
from dq_export.deploy.latency import measure
from dq_export.deploy.ort import ORT
from dq_export.deploy.parity import CallParity, compare_calls, difference, pick_calls, save_replay, worst

from .families.reference import Reference
from .report import CallReport, LatencyReport, ParityReport, TrajectoryReport

Float32 = npt.NDArray[np.float32]
HELD_OUT = 1_000_000
"""Added to the seed for parity's pictures, so that they are none of calibration's."""
SAMPLES = 10
CALL_SAMPLES = 2


def open_stages(folder: Path) -> dict[str, Engine]:
    """float ONNX, Q/DQ ONNX run node by node, and, where one was built, the engine."""
    stages = {
        "float-onnx": ORT.load(folder / "float" / "model.onnx"),
        "qdq-onnx": ORT.load(folder / "model.onnx", optimize=False),
    }
    if (folder / "engine").is_dir():
        stages["engine"] = ORT.load(folder / "model.onnx")
    return stages


def verify(
    reference: Reference,
    recipe: Recipe,
    calibration: CalibrationResult,
    folder: Path,
    target: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Compare every stage with PyTorch per timestep bin and over whole trajectories from the same noise.

    Calls are those of a guided PyTorch trajectory over labels and noise that calibration did not see, one for each bin.
    Writes replay files and, for pictures of 1 or 3 channels, `pictures.png` to `target`.
    """
    stages = open_stages(folder)
    total = recipe.steps * (len(stages) + 2)
    labels = np.arange(SAMPLES, dtype=np.int64) % reference.classes
    noise = reference.noise(SAMPLES, recipe.seed + HELD_OUT)
    guidance = recipe.guidance_scale or 1.0
    done = 0

    def counted(network: Callable[[Feed], Float32]) -> Callable[[Feed], Float32]:
        def call(feed: Feed) -> Float32:
            nonlocal done
            done += 1
            progress(done, total)
            return network(feed)

        return call

    few = slice(0, CALL_SAMPLES)
    recorded = list(reference.calls(counted(reference.forward), noise[few], labels[few], steps=recipe.steps, guidance=guidance))
    bins = calibration.bins().index([float(feed["timestep"][0]) for feed, _ in recorded])
    chosen = pick_calls(bins)
    feeds = [_expanded(recorded[i][0], recipe) for i in chosen]
    references = [recorded[i][1] for i in chosen]
    rows = compare_calls(stages, feeds, references, [int(bins[i]) for i in chosen])
    last = list(stages)[-1]
    target.mkdir(parents=True)
    replay = save_replay(target, feeds, references, worst(rows, last).difference.sqnr)
    draw: dict[str, Float32] = {}
    for name, network in {"pytorch": reference.forward, **stages}.items():
        timed = counted(lambda feed, network=network: network(_expanded(feed, recipe)))  # type: ignore[misc]
        draw[name] = reference.draw(timed, noise, labels, steps=recipe.steps, guidance=guidance)
    trajectories = [_trajectory(name, draw["pytorch"], draw[name]) for name in stages]
    save_pictures(target / "pictures.png", [draw["pytorch"], draw[last]])
    parity = ParityReport(calls=[_call(row) for row in rows], trajectories=trajectories, replay=replay)
    low = worst(rows, last)
    summary = (
        f"{last} at worst {low.difference.sqnr:.1f} dB (timestep {low.timestep:g}), trajectory {trajectories[-1].sqnr:.1f} dB"
    )
    return {"summary": summary, "parity": parity.model_dump()}


def bench(folder: Path, rounds: int = 15) -> LatencyReport:
    """Latency of the engine against the float ONNX graph, interleaved, on the parity inputs' shapes."""
    from polygraphy.json import load_json

    feed = load_json(str(folder / "parity" / "inputs.json"))[0]
    engines = {"float": ORT.load(folder / "float" / "model.onnx"), "engine": ORT.load(folder / "model.onnx")}
    taken = measure(engines, feed, rounds=rounds)
    return LatencyReport(
        batch=len(feed["hidden_states"]),
        float_ms=taken["float"].median,
        engine_ms=taken["engine"].median,
        ratio=taken["float"].median / taken["engine"].median,
    )


def save_pictures(path: Path, rows: list[Float32]) -> bool:
    """One row of pictures for each array float32[N, 1 or 3, H, W] in [-1, 1], enlarged; False for other channels."""
    from PIL import Image

    if rows[0].shape[1] not in (1, 3):
        return False
    framed = [np.pad(_bytes_of(row), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=96) for row in rows]
    grid = np.concatenate([np.concatenate(list(row), axis=2) for row in framed], axis=1).transpose(1, 2, 0)
    factor = max(1, 64 // rows[0].shape[-1])
    large = grid.repeat(factor, axis=0).repeat(factor, axis=1)
    Image.fromarray(large[..., 0] if large.shape[-1] == 1 else large).save(path, format="PNG")
    return True


def _bytes_of(row: Float32) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint(row * 127.5 + 127.5), 0, 255).astype(np.uint8)
    return pixels


def _expanded(feed: Feed, recipe: Recipe) -> Feed:
    """The feed with a timestep for each sample, where the graph takes one."""
    if recipe.timesteps == "shared":
        return feed
    return {**feed, "timestep": np.repeat(feed["timestep"], len(feed["hidden_states"]))}


def _trajectory(stage: str, exact: Float32, found: Float32) -> TrajectoryReport:
    whole = difference(exact, found)
    each = [difference(a, b).sqnr for a, b in zip(exact, found, strict=True)]
    return TrajectoryReport(
        stage=stage,
        samples=len(exact),
        sqnr=whole.sqnr,
        worst_sqnr=min(each),
        cosine=whole.cosine,
        max_error=whole.max_error,
    )


def _call(row: CallParity) -> CallReport:
    d = row.difference
    return CallReport(stage=row.stage, timestep=row.timestep, bin=row.bin, sqnr=d.sqnr, cosine=d.cosine, max_error=d.max_error)
