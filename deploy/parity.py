"""Comparing the PyTorch reference with the float graph, the Q/DQ graph and the engine, by polygraphy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .backend import Engine, Feed, Float32

OUTPUT = "sample"
REPLAY_MARGIN = 1.0
"""dB that a replay may lose against the run that wrote the tolerance: other kernels round otherwise."""
FLOAT_SQNR = 80.0
"""dB that the float graph must keep: float32 rounding costs about 130 dB, a wrong export is below 40."""
CAP = 200.0


class ParityError(Exception):
    """A stage's output is too far from the reference's; names the stage and the worst timestep."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one output is from the reference's.

    Args:
        sqnr: signal to noise, dB, at most 200.
        cosine: cosine similarity of the flattened outputs.
        max_error: greatest absolute difference.
    """

    sqnr: float
    cosine: float
    max_error: float


@dataclass(frozen=True, kw_only=True)
class CallParity:
    """One network call of one stage against the reference."""

    stage: str
    timestep: float
    bin: int
    difference: Difference


def difference(reference: Float32, other: Float32) -> Difference:
    """Compare two outputs of the same shape. A NaN or Inf gives -200 dB."""
    if not np.isfinite(other).all():
        return Difference(sqnr=-CAP, cosine=0.0, max_error=float("inf"))
    exact, found = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    noise, signal = float(np.square(exact - found).sum()), float(np.square(exact).sum())
    sqnr = CAP if noise == 0 else float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -CAP, CAP))
    norm = float(np.linalg.norm(exact) * np.linalg.norm(found))
    cosine = float(exact @ found) / norm if norm else 1.0
    return Difference(sqnr=sqnr, cosine=cosine, max_error=float(np.abs(exact - found).max()))


def compare_calls(
    stage: str,
    engine: Engine,
    feeds: Sequence[Feed],
    references: Sequence[Float32],
    bins: Sequence[int],
    count: Callable[[], None] = lambda: None,
) -> list[CallParity]:
    """Run a stage on every feed with polygraphy's runner of its runtime.

    Args:
        feeds: one network call each.
        references: the PyTorch outputs.
        bins: the timestep bin of each feed.
        count: called after each call.
    """
    rows = []
    with engine.runner(stage) as runner:
        for feed, reference, index in zip(feeds, references, bins, strict=True):
            output = runner.infer(dict(feed), check_inputs=False)[OUTPUT]
            timestep = float(np.asarray(feed["timestep"]).ravel()[0])
            rows.append(CallParity(stage=stage, timestep=timestep, bin=index, difference=difference(reference, output)))
            count()
    return rows


def worst(rows: Sequence[CallParity], stage: str) -> CallParity:
    """The stage's call of the least SQNR."""
    return min((row for row in rows if row.stage == stage), key=lambda row: row.difference.sqnr)


def require(rows: Sequence[CallParity], floors: Mapping[str, float]) -> None:
    """Fail where a stage's worst call is below its floor in dB.

    Raises:
        ParityError: all such stages, with the advice that fits the first of them: the earliest stage is to blame.
    """
    low = [worst(rows, stage) for stage, floor in floors.items() if worst(rows, stage).difference.sqnr < floor]
    if low:
        lines = [
            f"{r.stage}: {r.difference.sqnr:.1f} dB at timestep {r.timestep:g}, required {floors[r.stage]:.1f} dB" for r in low
        ]
        advice = (
            "the float graph differs already: the exporter is to blame, not quantization"
            if low[0].stage == "float-onnx"
            else "try --scaling auto, --bins per-step or --exclude for the sites with the largest error in report.json"
        )
        raise ParityError("; ".join(lines) + f". {advice[0].upper()}{advice[1:]}.")


def save_replay(folder: Path, feeds: Sequence[Feed], references: Sequence[Float32]) -> None:
    """Write `inputs.json` and `outputs.json` as `polygraphy run` loads them."""
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    results = RunResults()
    results.append(
        ("pytorch", [IterationResult(outputs={OUTPUT: output}, runtime=0.0, runner_name="pytorch") for output in references])
    )
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        save_json([dict(feed) for feed in feeds], str(folder / "inputs.json"), description="parity inputs")
        results.save(str(folder / "outputs.json"))


def load_replay(folder: Path) -> tuple[list[Feed], list[Float32]]:
    """Read what `save_replay` wrote: inputs and reference outputs of each call."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        feeds = load_json(str(folder / "inputs.json"))
        results = RunResults.load(str(folder / "outputs.json"))["pytorch"]
    return list(feeds), [result[OUTPUT] for result in results]


def save_command(folder: Path, floor: float, model: str = "model.onnx") -> str:
    """Write the polygraphy command that replays `out/parity` from `out`; returns it.

    Args:
        folder: where `command.txt` goes.
        floor: the least SQNR in dB of the engine on these feeds.
        model: the graph, from `out`.
    """
    command = (
        f"polygraphy run {model} --onnxrt --load-inputs parity/inputs.json --load-outputs parity/outputs.json "
        f"--compare snr --snr-threshold {OUTPUT}:{floor - REPLAY_MARGIN:.2f}"
    )
    (folder / "command.txt").write_text(command + "\n")
    return command


def pick_calls(bins: npt.NDArray[np.int64], least: int = 25) -> list[int]:
    """Which calls of a trajectory to compare: the middle one of each bin's, and `least` evenly spaced ones.

    Args:
        bins: int64[T], the bin of each call.
    """
    chosen = set(np.linspace(0, len(bins) - 1, min(least, len(bins))).round().astype(int).tolist())
    for index in set(bins.tolist()):
        inside = np.flatnonzero(bins == index)
        chosen.add(int(inside[len(inside) // 2]))
    return sorted(chosen)
