"""Measures the gain of block-wise training over GPTQ, with real engines of dit-digits, its hard copy and pixart-digits.

    pip install ".[cpu,metrics]" && python benchmarks/distill.py [--models plain hard text] [--forms NAME ...] [--json FILE]
    python benchmarks/distill.py --ablation     tables only, weights only, no biases, float inputs, with and without dilation

A row has the SQNR in dB of a network call against PyTorch, mean and worst over a guided trajectory, and of ten pictures from the
same noise, each with GPTQ and its gain with `--rounding distill`; and the CPU seconds of the training. `--device cuda` samples
and trains on a GPU; the engines stay on the processor. `--json` writes a result file for `benchmarks/measured.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from result_table import ResultTable

from dq_export.calibration.training.task import Task
from dq_export.calibration.training.trainer import Trainer
from dq_export.core.recipe import Recipe
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
COLUMNS = ("model", "bits, scales", "mean of the calls, dB", "worst call", "ten pictures", "CPU s of the training")
TITLES = {"plain": "dit-digits", "hard": "hard copy", "text": "pixart-digits"}
Decibels = tuple[float, float, float]


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


def measure(model: str, options: Mapping[str, Any], folder: Path, device: str) -> tuple[Decibels, float]:
    """Export, and return ((mean call, worst call, pictures) in dB, CPU seconds)."""
    guidance = MODELS.get(model, ("", 2.0))[1]
    recipe = Recipe.parse({"model": model, "guidance_scale": guidance, "min_sqnr": -200, **options}, "benchmark")
    start = time.process_time()
    report = run(recipe, folder, Options(device=device), until="verify")
    seconds = time.process_time() - start
    assert report is not None
    assert report.parity is not None
    worst = report.worst_call("engine")
    assert worst is not None
    return (report.mean_sqnr("engine"), worst.sqnr, report.parity.trajectories[0].sqnr), seconds


def cells(model: str, options: Mapping[str, Any], training: Mapping[str, Any], folder: Path, device: str) -> list[str]:
    """Return the figures of an export with GPTQ and the gain of training, behind the names of model and form."""
    calibration = {key: value for key, value in training.items() if not key.startswith("distill_")}
    before, gptq_seconds = measure(model, {**options, **calibration, "rounding": "gptq"}, folder / "gptq", device)
    with float_inputs() if folder.name == FLOAT_INPUTS else nullcontext():
        after, seconds = measure(model, {**options, **training, "rounding": "distill"}, folder / "distill", device)
    gains = [f"{old:.1f} {new - old:+.1f}" for old, new in zip(before, after, strict=True)]
    return [*gains, f"{seconds - gptq_seconds:.0f}"]


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
