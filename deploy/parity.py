"""Comparing the PyTorch reference with the float graph, the Q/DQ graph and the engine, by polygraphy's runners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dq_export.core.compare import MAX_SQNR, decibels

from .backend import Engine, Feed, Float32

FLOAT_SQNR = 80.0
"""The limit of the float graph in dB: with float32 rounding alone it has about 130 dB, a wrong export has below 40."""


DECIBELS = {"ge": -MAX_SQNR, "le": MAX_SQNR}
"""The bounds of a number in dB, which are checked when a report is read back."""


class ParityError(Exception):
    """A stage's output is too far from the reference; the message names the stage and the worst timestep."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between an output and PyTorch's.

    Args:
        sqnr: signal to noise, dB; -200 if an output is not finite.
        cosine: cosine similarity of the flattened outputs.
        max_error: greatest absolute difference; None if an output is not finite.
    """

    sqnr: float = field(metadata=DECIBELS)
    cosine: float
    max_error: float | None


@dataclass(frozen=True, kw_only=True)
class CallParity(Difference):
    """The difference between one network call and PyTorch's.

    Args:
        stage: float-onnx, qdq-onnx or engine.
        bin: index into the union of all tables' bins.
    """

    stage: str
    timestep: float
    bin: int


@dataclass(frozen=True, kw_only=True)
class TrajectoryParity(Difference):
    """The difference between pictures and PyTorch's pictures, sampled from the same noise.

    Args:
        stage: the stage that drew them, as in `CallParity`.
        samples: number of pictures. `sqnr` is over all of them together.
        worst_sqnr: SQNR of the worst picture, dB.
        psnr: mean peak signal to noise of the decoded pictures, dB; None for latents that were not decoded.
        ssim: mean structural similarity of the pictures; 1 if they are equal.
        lpips: mean perceptual distance of the pictures; 0 if they are equal. None without the weights of the metric.
        clip, clip_of_pytorch: mean CLIP score of these pictures, and of PyTorch's, with their prompts, 0 … 100. None without a
            CLIP, or without prompts.
    """

    stage: str
    samples: int
    worst_sqnr: float = field(metadata=DECIBELS)
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    clip: float | None = None
    clip_of_pytorch: float | None = None

    def appearance(self) -> str:
        """PSNR, SSIM, LPIPS and CLIP scores, as far as they are known."""
        parts = [
            f"PSNR {self.psnr:.1f} dB" if self.psnr is not None else "",
            f"SSIM {self.ssim:.4f}" if self.ssim is not None else "",
            f"LPIPS {self.lpips:.4f}" if self.lpips is not None else "",
            f"CLIP score {self.clip:.2f} (PyTorch's {self.clip_of_pytorch:.2f})" if self.clip is not None else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The differences between each stage and PyTorch.

    Args:
        replay: the polygraphy command that compares the calls again when it is run in the output folder.
    """

    calls: tuple[CallParity, ...] = field(metadata={"min_length": 1})
    trajectories: tuple[TrajectoryParity, ...]
    replay: str = ""


def difference(reference: Float32, other: Float32) -> Difference:
    """Compare two outputs of the same shape. A NaN or Inf gives -200 dB."""
    if not np.isfinite(other).all():
        return Difference(sqnr=-MAX_SQNR, cosine=0.0, max_error=None)
    exact, actual = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    noise, signal = float(np.square(exact - actual).sum()), float(np.square(exact).sum())
    norm = float(np.linalg.norm(exact) * np.linalg.norm(actual))
    cosine = float(exact @ actual) / norm if norm else 1.0
    return Difference(sqnr=float(decibels(signal, noise)), cosine=cosine, max_error=float(np.abs(exact - actual).max()))


def compare_pictures(stage: str, references: Float32, pictures: Float32) -> TrajectoryParity:
    """Compare pictures float32[N, ...] that a stage drew."""
    sqnr = [difference(exact, picture).sqnr for exact, picture in zip(references, pictures, strict=True)]
    return TrajectoryParity(stage=stage, samples=len(sqnr), worst_sqnr=min(sqnr), **vars(difference(references, pictures)))


def compare_calls(
    stage: str,
    engine: Engine,
    calls: Sequence[Sequence[Feed]],
    references: Sequence[Float32],
    bins: Sequence[int],
    count: Callable[[], None] = lambda: None,
) -> list[CallParity]:
    """Run a stage on recorded network calls with polygraphy's runner of its runtime.

    Args:
        calls: for each network call the feed, or its rows in several feeds.
        references: the PyTorch outputs.
        bins: the timestep bin of each call.
        count: called after each call.
    """
    rows = []
    with engine.runner(stage) as runner:
        for feeds, reference, index in zip(calls, references, bins, strict=True):
            outputs = [np.array(value) for feed in feeds for value in runner.infer(dict(feed), check_inputs=False).values()]
            timestep, error = float(np.asarray(feeds[0]["timestep"]).ravel()[0]), difference(reference, np.concatenate(outputs))
            rows.append(CallParity(stage=stage, timestep=timestep, bin=index, **vars(error)))
            count()
    return rows


def worst(rows: Sequence[CallParity], stage: str) -> CallParity:
    """The call of a stage with the lowest SQNR."""
    return min((row for row in rows if row.stage == stage), key=lambda row: row.sqnr)


def pick_calls(bins: npt.NDArray[np.int64], spaced: int = 25) -> list[int]:
    """The calls of a trajectory to compare: the middle call of each bin, and `spaced` evenly spaced ones.

    Args:
        bins: int64[T], the bin of each call.
    """
    calls = set(np.linspace(0, len(bins) - 1, min(spaced, len(bins))).round().astype(int).tolist())
    for index in set(bins.tolist()):
        inside = np.flatnonzero(bins == index)
        calls.add(int(inside[len(inside) // 2]))
    return sorted(calls)
