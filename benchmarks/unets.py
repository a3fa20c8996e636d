"""Recipes of published methods for UNets, side by side on the two small UNets that `examples/train_unet_digits.py` trains.

    pip install ".[cpu,metrics]" && python benchmarks/unets.py unet-digits [--networks class text] [--bits w8a8 w6a6 w4a8]

The figures are those of `benchmarks/quality.py`, whose engines these are. A published method is taken as far as options express
it. `--json` writes a result file for `benchmarks/measured.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from quality import Bench
from reading import Reader
from result_table import ResultTable

SMALL = {"calib_size": 8, "parity_size": 4}
"""Pictures."""
PLAIN = {"granularity": "tensor", "rounding": "rtn"}
"""Where a recipe says nothing else: w4a8 has other defaults."""
STATIC: dict[str, Any] = {"scaling": "none", "bins": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "static": STATIC,
    "static, least error of weights (Q-Diffusion's set and scales)": {**STATIC, "rounding": "mse"},
    "per timestep (TDQ's table)": {"scaling": "none"},
    "per step, least error of weights (EfficientDM's settings)": {"scaling": "none", "bins": "per-step", "rounding": "mse"},
    "per step, dilate (DilateQuant's settings)": {"scaling": "dilate", "bins": "per-step"},
    "per step, dilate, trained (DilateQuant whole)": {"scaling": "dilate", "bins": "per-step", "rounding": "distill"},
    "per timestep, auto, gptq (ours)": {"rounding": "gptq"},
    "per timestep, auto, trained (ours)": {"rounding": "distill"},
}
COLUMNS = ("network", "recipe", "SQNR of a call, dB", "worst", "of pictures", "digits read", "MB", "low precision")


def main() -> None:
    """Export, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of examples/train_unet_digits.py")
    parser.add_argument("--networks", nargs="*", default=["class", "text"], choices=["class", "text"])
    parser.add_argument("--bits", nargs="*", default=["w8a8", "w6a6", "w4a8"])
    parser.add_argument("--recipes", nargs="*", default=[""], help="words that a recipe's name must begin with")
    parser.add_argument("--count", type=int, default=100, help="digits to draw for reading")
    parser.add_argument("--steps", type=int, default=20, help="of every picture")
    parser.add_argument("--keep", type=Path, help="folder for a strip of twenty digits of every row")
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    recipes = {label: values for label, values in RECIPES.items() if label.startswith(tuple(options.recipes))}
    reader, table = Reader.train(), ResultTable(COLUMNS, options.json)
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.networks:
            bench = Bench(name, str(options.folder / name), Path(temporary), options, reader)
            read, _ = bench.digits(bench.reference.forward, "PyTorch")
            table.add([name, "PyTorch float32", "", "", "", f"{read:.1%}", "", ""])
            for bits in options.bits:
                for label, values in recipes.items():
                    recipe = {"bits": bits, "steps": options.steps, **SMALL, **PLAIN, **values}
                    figures = bench.export(f"{bits} {label}", recipe)
                    digits = [f"{figures.read:.1%}", figures.megabytes(), figures.low_precision()]
                    table.add([name, f"{bits} {label}", *figures.decibels(), *digits])


if __name__ == "__main__":
    main()
