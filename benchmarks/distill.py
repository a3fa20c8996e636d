"""Measures the gain of block-wise training over GPTQ, with real engines of dit-digits, its hard copy and pixart-digits.

    pip install ".[cpu,metrics]" && python benchmarks/distill.py [--models plain hard text] [--forms NAME ...] [--iterations N]
    python benchmarks/distill.py --ablation     tables only, weights only, no biases, with and without weight dilation

A row has the SQNR in dB of a network call against PyTorch, mean and worst over a guided trajectory, and of ten pictures from the
same noise, each with GPTQ and its gain with `--rounding distill`; and the CPU seconds of the training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dq_export.core.recipe import Recipe
from dq_export.families.source import MODELS, PACKAGED
from dq_export.pipeline import run

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
OFF = 1e-9
"""A rate that changes no value."""
ABLATION: dict[str, dict[str, Any]] = {
    "all": {},
    "tables only": {"distill_rate": OFF, "distill_bias_rate": OFF},
    "weights only": {"distill_scale_rate": OFF, "distill_bias_rate": OFF},
    "weights and tables": {"distill_bias_rate": OFF},
    "all, a table row a timestep": {"bins": "per-step"},
    "all, weight dilation": {"scaling": "dilate"},
    "all, no scaling": {"scaling": "none"},
}
Figures = tuple[float, float, float]


def figures(model: str, options: Mapping[str, Any], folder: Path) -> tuple[Figures, float]:
    """Export, and return ((mean call, worst call, pictures) in dB, CPU seconds)."""
    guidance = MODELS.get(model, ("", 2.0))[1]
    recipe = Recipe.parse({"model": model, "guidance_scale": guidance, "min_sqnr": -200, **options}, "benchmark")
    start = time.process_time()
    report = run(recipe, folder, until="verify")
    seconds = time.process_time() - start
    assert report is not None
    assert report.parity is not None
    worst = report.worst_call("engine")
    assert worst is not None
    return (report.mean_sqnr("engine"), worst.sqnr, report.parity.trajectories[0].sqnr), seconds


def row(name: str, label: str, model: str, options: Mapping[str, Any], training: Mapping[str, Any], temporary: Path) -> None:
    """Print the figures of an export with GPTQ, and the gain of training."""
    calibration = {key: value for key, value in training.items() if not key.startswith("distill_")}
    before, plain = figures(model, {**options, **calibration, "rounding": "gptq"}, temporary / name / label / "gptq")
    after, trained = figures(model, {**options, **training, "rounding": "distill"}, temporary / name / label / "distill")
    cells = [f"{old:.1f} {new - old:+.1f}" for old, new in zip(before, after, strict=True)]
    print(f"| {name} | {label} | {' | '.join(cells)} | {trained - plain:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["plain"], choices=("plain", "hard", "text"))
    parser.add_argument("--forms", nargs="*", default=list(FORMS), help="words that a form's name must begin with")
    parser.add_argument("--iterations", type=int, default=150, help="iterations of a block")
    parser.add_argument("--ablation", action="store_true", help="parts of the training, of w4a4 per timestep")
    options = parser.parse_args()
    print("| model | form | SQNR a call | worst | pictures | CPU s |\n|---|---|---|---|---|---|", flush=True)
    training = {"distill_iterations": options.iterations}
    with tempfile.TemporaryDirectory() as temporary:
        models = {"plain": "dit-digits", "hard": str(Path(temporary) / "model"), "text": "pixart-digits"}
        harden_folder(PACKAGED / "dit-digits", Path(models["hard"]))
        for name in options.models:
            if options.ablation:
                for label, changes in ABLATION.items():
                    row(name, label, models[name], FORMS["w4a4 per timestep"], {**training, **changes}, Path(temporary))
                continue
            for label, form in FORMS.items():
                if any(label.startswith(word) for word in options.forms):
                    row(name, label, models[name], form, training, Path(temporary))


if __name__ == "__main__":
    main()
