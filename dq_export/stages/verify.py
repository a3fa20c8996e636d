"""The stage `verify`: how near each graph and the engine are to what PyTorch computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dq_export.core.digest import file_digest
from dq_export.core.recipe import Recipe
from dq_export.deploy.backend import Engine, Feed
from dq_export.deploy.onnxruntime.cpu import open_graph
from dq_export.deploy.parity import CallParity, Parity, compare_calls, compare_pictures, worst
from dq_export.deploy.triton.serving.model import images_of

from ..families.metric_weights import metric_files
from ..families.reference import Float32
from ..finished_folder import MODEL, REPLAY, engine_of, portable_name
from ..heap import large_blocks_mapped
from ..ledger import Result
from ..output_folder import remove
from ..report.report import PicturesReport
from .appearance import SHOWN, Pair, appearance, decoded, draws_pictures, origin
from .build import BUILD
from .calibrate import CALIBRATE
from .quantize import QUANTIZE
from .recording import Recording, draw, feed_of, prompts_of
from .reference import REFERENCE
from .stage import Context, Stage

PICTURES = f"{REPLAY}/pictures.png"
LARGEST = 512
"""Pixels of a side of a picture in the report."""


class Verified(Result):
    """What the comparison found."""

    parity: Parity
    pictures: PicturesReport | None = None


@dataclass(frozen=True)
class Verify(Stage[Verified]):
    """Compares graphs and engine with the recording call by call, and the last of them over whole trajectories."""

    name: str = "verify"
    result: type[Verified] = Verified
    needs: tuple[Stage[Any], ...] = (QUANTIZE, REFERENCE, BUILD)

    def modules(self, recipe: Recipe) -> tuple[str, ...]:
        """What runs the graphs, compares, and writes the pictures."""
        return ("onnxruntime", "polygraphy", "PIL")

    def text(self, context: Context) -> str:
        """What is compared."""
        return "PyTorch, float ONNX, Q/DQ ONNX, engine"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """Pictures, where there are some, and a graph for the CPU where the engine's own does not run there."""
        pictures = (PICTURES,) if draws_pictures(context.reference, context.undecoded) else ()
        portable = portable_name(context.recipe)
        return (*pictures, *((portable, f"{portable}.data") if portable != MODEL else ()))

    def also(self, context: Context) -> dict[str, Any]:
        """Whether this machine runs the engine, the VAE, and the weights that judge pictures."""
        folder, vae = context.recipe.metric_weights, context.reference.decoder
        weights = [file_digest(path) for path in metric_files(Path(folder))] if folder else []
        values: dict[str, Any] = {"weights": weights} if weights else {}
        if vae is not None:
            values["vae"] = context.undecoded or [file_digest(path) for path in sorted(vae.iterdir()) if path.is_file()]
        return {"engine": _runs(context), **values}

    def run(self, context: Context, target: Path) -> Verified:
        """Compare with one graph or engine in memory at a time."""
        (target / REPLAY).mkdir()
        with large_blocks_mapped():
            return self._compared(context, target)

    def _compared(self, context: Context, target: Path) -> Verified:
        recording = Recording.load(context.folder / REPLAY)
        loaders = _loaders(context, target)
        comparison = _Comparison(context, recording, len(loaders))
        rows: list[CallParity] = []
        pictures, last = recording.pictures, list(loaders)[-1]
        for name, load in loaders.items():
            engine = load()
            rows += comparison.calls(name, engine, by_row=name != last)
            if name == last:
                pictures = comparison.pictures(engine)
            del engine
        trajectory, low = compare_pictures(last, recording.pictures, pictures), worst(rows, last)
        looks, strip = _write_strip(context, (recording.pictures, pictures), target / PICTURES)
        trajectory = replace(trajectory, **looks)
        distances = ", ".join(filter(None, [f"trajectory {trajectory.sqnr:.1f} dB", trajectory.appearance()]))
        summary = f"{last} at worst {low.sqnr:.1f} dB (timestep {low.timestep:g}), {distances}"
        return Verified(summary=summary, parity=Parity(calls=tuple(rows), trajectories=(trajectory,)), pictures=strip)


VERIFY = Verify()


def _runs(context: Context) -> bool:
    """Whether there is an engine that this machine runs."""
    return context.backend is not None and BUILD in context.results and context.backend.runs


def _loaders(context: Context, target: Path) -> dict[str, Callable[[], Engine]]:
    """How to load the float graph, the Q/DQ graph run node by node, and, where it runs on this machine, the engine."""
    folder, backend = context.folder, context.backend
    portable = backend.portable(folder / MODEL, target / REPLAY) if backend else folder / MODEL
    loaders: dict[str, Callable[[], Engine]] = {
        # Run a few times only: to transpose and pack three gigabytes of weights costs more than it saves.
        "float-onnx": lambda: open_graph(folder / "float" / MODEL, prepack=False),
        "qdq-onnx": lambda: open_graph(portable, optimize=False),
    }
    if backend and _runs(context):
        loaders["engine"] = lambda: backend.load(engine_of(folder))
    return loaders


def _write_strip(context: Context, pair: Pair, path: Path) -> tuple[dict[str, Any], PicturesReport]:
    """Write the pictures of what PyTorch and the engine sampled, where there are some; return how far apart they look."""
    reference, recipe, count = context.reference, context.recipe, len(pair[0])
    text = origin(reference, context.undecoded, count)
    if not draws_pictures(reference, context.undecoded):
        remove(context.folder / PICTURES)  # of an earlier run that had a VAE; the report would show it
        return {}, PicturesReport(shown=0, origin=text)
    prompts = prompts_of(reference, recipe)
    if context.undecoded:
        looks, columns = appearance(recipe, *pair, prompts), count
    else:
        pair = decoded(reference, recipe, pair, context.progress.advance)
        looks, columns = appearance(recipe, *pair, prompts) if len(pair[0]) == count else {}, min(SHOWN, count)
    exact, actual = (pictures[:columns] for pictures in pair)
    save_pictures(path, [exact, actual, np.clip(4 * (actual - exact), -1, 1)])
    return looks, PicturesReport(shown=columns, origin=text)


class _Comparison:
    """The calls and pictures of each engine, with progress over all of them."""

    def __init__(self, context: Context, recording: Recording, engines: int) -> None:
        self.context, self.recording, self.done = context, recording, 0
        recipe, reference = context.recipe, context.reference
        calls = len(reference.timesteps(recipe.steps)) * -(-recipe.parity_size // reference.batch)
        self.total = len(recording.feeds) * engines + calls

    def calls(self, name: str, engine: Engine, *, by_row: bool) -> list[CallParity]:
        """Every recorded call.

        Args:
            by_row: run it in the parts in which PyTorch computes it. A graph that writes the scores of attention out holds
                less then.
        """
        feeds, reference = self.recording.feeds, self.context.reference
        timesteps = [float(np.asarray(feed["timestep"]).ravel()[0]) for feed in feeds]
        bins = self.context.results.of(CALIBRATE).bins.index(timesteps).tolist()
        calls = [reference.parts(feed) if by_row else [feed] for feed in feeds]
        return compare_calls(name, engine, calls, self.recording.outputs, bins, self._count)

    def pictures(self, engine: Engine) -> Float32:
        """The recording's pictures, drawn by the engine from the same noise."""
        recipe = self.context.recipe

        def call(feed: Feed) -> Float32:
            output = engine(feed_of(feed, recipe))
            self._count()
            return output

        return draw(self.context.reference, call, recipe)

    def _count(self) -> None:
        self.done += 1
        self.context.progress.advance(self.done, self.total, "calls")


def save_pictures(path: Path, rows: list[Float32]) -> None:
    """Write one row of pictures for each array float32[N, 1 or 3, H, W] in [-1, 1]; NaN is black.

    Small ones are enlarged. Sides of more than LARGEST pixels are halved until they are not, so that a report has few megabytes.
    """
    from PIL import Image

    while max(rows[0].shape[2:]) > LARGEST:
        rows = [_halved(row) for row in rows]
    images = [images_of(np.nan_to_num(row, nan=-1)) for row in rows]
    frames = [np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96) for image in images]
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in frames])
    factor = max(1, 64 // rows[0].shape[-1])
    large = grid.repeat(factor, axis=0).repeat(factor, axis=1)
    Image.fromarray(large[..., 0] if large.shape[-1] == 1 else large).save(path, format="PNG")


def _halved(pictures: Float32) -> Float32:
    """Pictures of half the height and width, of the means of 2 x 2 pixels. A last odd row or column is left out."""
    count, channels, height, width = (size // 2 if axis > 1 else size for axis, size in enumerate(pictures.shape))
    means: Float32 = pictures[..., : 2 * height, : 2 * width].reshape(count, channels, height, 2, width, 2).mean(axis=(3, 5))
    return means
