"""Measures each equivalent scaling, static and per timestep, on dit-digits and its hard copy, for a table in docs/measured.md.

    pip install ".[cpu]" && python benchmarks/scalings.py

Each cell is an export up to parity: the mean SQNR in dB of a network call of the real engine against PyTorch over one guided
trajectory, and in brackets that of ten pictures from the same noise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from dq_export.core.recipe import Recipe
from dq_export.families.source import PACKAGED
from dq_export.pipeline import run

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from hard_copy import harden_folder

SCALINGS = ("none", "dilate", "smooth", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=["mse"])
    parser.add_argument("--calib-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        hard = Path(temporary) / "hard"
        harden_folder(PACKAGED / "dit-digits", hard)
        print("| scaling | method | bins | dit-digits | hard copy |\n|---|---|---|---|---|", flush=True)
        for method in options.methods:
            for scaling in SCALINGS:
                for bins in (1, "auto"):
                    cells = []
                    for model in ("dit-digits", str(hard)):
                        recipe = Recipe.parse(
                            {
                                "model": model,
                                "scaling": scaling,
                                "bins": bins,
                                "method": method,
                                "guidance_scale": 2.0,
                                "calib_size": options.calib_size,
                                "steps": options.steps,
                                "min_sqnr": -200,
                            },
                            "benchmark",
                        )
                        out = Path(temporary) / "out" / f"{Path(model).name}-{scaling}-{bins}-{method}"
                        report = run(recipe, out, until="verify")
                        assert report
                        assert report.parity
                        trajectory = next(t.sqnr for t in report.parity.trajectories if t.stage == "engine")
                        cells.append(f"{report.mean_sqnr('engine'):.1f} ({trajectory:.1f})")
                    label = "static" if bins == 1 else "per timestep"
                    print(f"| {scaling} | {method} | {label} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
