"""Measures the gain of block-wise training over GPTQ, with real engines of dit-digits, its hard copy and pixart-digits.

    pip install ".[cpu,metrics]" && python benchmarks/distill.py [--models plain hard text] [--forms NAME ...] [--json FILE]
    python benchmarks/distill.py --ablation     tables only, weights only, no biases, float inputs, with and without dilation

A row has the SQNR in dB of a network call against PyTorch, mean and worst over guided trajectories, and the mean SQNR of 40
pictures from the same noise, each with GPTQ and its gain with `--rounding distill`; and the CPU seconds of the training. Behind
the pictures' gain is its standard error, from picture to picture. `--device cuda` samples and trains on a GPU; the engines stay
on the processor. `--json` writes a result file for `benchmarks/measured.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from digits import draw_in_parts, load_model
from result_table import ResultTable

from dq_export.calibration.training.task import Task
from dq_export.calibration.training.trainer import Trainer
from dq_export.core.recipe import Recipe
from dq_export.deploy.onnxruntime.cpu import open_graph
from dq_export.deploy.parity import difference
from dq_export.families.reference import Float32
from dq_export.families.source import MODELS, PACKAGED
from dq_export.pipeline import run
from dq_export.preparation import Options

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from hard_copy import harden_folder

FORMS: dict[str, dict[str, Any]] = {
    "w4a8": {"bits": "w4a8"},
    "w4a8 per timestep": {"bits": "w4a8", "granularity": "tensor"},
    "w4a8 per token": {"bits": "w4a8", "granularity": "token"},
    "w4a4 per timestep": {"bits": "w4a4"},
    "w4a4 per token": {"bits": "w4a4", "granularity": "token"},
    "w6a6 per timestep": {"bits": "w6a6"},
    "w8a8 per timestep": {"bits": "w8a8"},
}
FLOAT_INPUTS = "all, float inputs of the blocks"
OFF = 1e-9
"""A rate that changes no value."""
ABLATION: dict[str, dict[str, Any]] = {
    "all": {},
    "tables only": {"distill_rate": OFF, "distill_bias_rate": OFF},
    "weights only": {"distill_scale_rate": OFF, "distill_bias_rate": OFF},
    "weights and tables": {"distill_bias_rate": OFF},
    FLOAT_INPUTS: {},
    "all, a table row a timestep": {"bins": "per-step"},
    "all, weight dilation": {"scaling": "dilate"},
    "all, no scaling": {"scaling": "none"},
}
COLUMNS = ("model", "bits, scales", "mean of the calls, dB", "worst call", "mean of 40 pictures", "CPU s of the training")
TITLES = {"plain": "dit-digits", "hard": "hard copy", "text": "pixart-digits"}
PICTURES, SEED = 40, 777


class Figures(NamedTuple):
    """Of one export: dB of a call, mean and worst, and of each picture; CPU seconds."""

    mean: float
    worst: float
    pictures: npt.NDArray[np.float64]
    seconds: float


@contextmanager
def float_inputs() -> Iterator[None]:
    """Within it, a block is trained and judged on the float network's input, not on that of the quantized blocks before it."""
    usual = Trainer._task

    def task(trainer: Trainer, index: int) -> Task:
        def run(layers: Any, rows: Any) -> Any:
            exact = trainer._before(index, "exact", rows)
            inputs = {"exact": exact, "error": [0 * part for part in exact]}
            with patch.object(trainer, "_before", lambda index, kind, rows: inputs[kind]):
                return trainer._run(index, layers, "error", rows)

        return replace(usual(trainer, index), run=run)

    with patch.object(Trainer, "_task", task):
        yield


def measure(model: str, options: Mapping[str, Any], folder: Path, device: str) -> Figures:
    """Export and measure."""
    recipe = Recipe.parse({"model": model, "guidance_scale": guidance_of(model), "min_sqnr": -200, **options}, "benchmark")
    start = time.process_time()
    report = run(recipe, folder, Options(device=device), until="verify")
    seconds = time.process_time() - start
    assert report is not None
    worst = report.worst_call("engine")
    assert worst is not None
    exact, pictures = float_pictures(model), pictures_of(model, open_graph(folder / "model.onnx"))
    sqnr = [difference(one, other).sqnr for one, other in zip(exact, pictures, strict=True)]
    return Figures(report.mean_sqnr("engine"), worst.sqnr, np.asarray(sqnr), seconds)


def guidance_of(model: str) -> float:
    return MODELS.get(model, ("", 2.0))[1]


@cache
def float_pictures(model: str) -> Float32:
    """Return what PyTorch draws."""
    return pictures_of(model, reference_of(model).forward)


reference_of = cache(load_model)
"""Loads a model, and encodes its prompts, once."""


def pictures_of(model: str, network: Callable[[Any], Float32]) -> Float32:
    """Draw PICTURES pictures of all conditions in turn."""
    reference = reference_of(model)
    conditions = np.arange(PICTURES) % len(reference.conditions)
    return draw_in_parts(reference, network, conditions, steps=50, guidance=guidance_of(model), seed=SEED)


def cells(model: str, options: Mapping[str, Any], training: Mapping[str, Any], folder: Path, device: str) -> list[str]:
    """Return the figures of an export with GPTQ and the gain of training, behind the names of model and form."""
    calibration = {key: value for key, value in training.items() if not key.startswith("distill_")}
    before = measure(model, {**options, **calibration, "rounding": "gptq"}, folder / "gptq", device)
    with float_inputs() if folder.name == FLOAT_INPUTS else nullcontext():
        after = measure(model, {**options, **training, "rounding": "distill"}, folder / "distill", device)
    gain = after.pictures - before.pictures
    error = gain.std(ddof=1) / len(gain) ** 0.5
    return [
        f"{before.mean:.1f} {after.mean - before.mean:+.1f}",
        f"{before.worst:.1f} {after.worst - before.worst:+.1f}",
        f"{before.pictures.mean():.1f} {gain.mean():+.1f} ± {error:.1f}",
        f"{after.seconds - before.seconds:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["plain"], choices=tuple(TITLES))
    parser.add_argument("--forms", nargs="*", default=[""], help="words that a row's name must begin with")
    parser.add_argument("--iterations", type=int, default=150, help="iterations of a block")
    parser.add_argument("--ablation", action="store_true", help="parts of the training, of w4a4 per timestep")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the sampling and the training")
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    table, training = ResultTable(COLUMNS, options.json), {"distill_iterations": options.iterations}
    if options.ablation:
        exports = {label: (FORMS["w4a4 per timestep"], {**training, **changes}) for label, changes in ABLATION.items()}
    else:
        exports = {label: (form, training) for label, form in FORMS.items()}
    exports = {label: values for label, values in exports.items() if label.startswith(tuple(options.forms))}
    with tempfile.TemporaryDirectory() as temporary:
        models = {"plain": "dit-digits", "hard": str(Path(temporary) / "model"), "text": "pixart-digits"}
        harden_folder(PACKAGED / "dit-digits", Path(models["hard"]))
        for name in options.models:
            for label, (form, changes) in exports.items():
                figures = cells(models[name], form, changes, Path(temporary) / name / label, options.device)
                table.add([TITLES[name], label, *figures])


if __name__ == "__main__":
    main()
