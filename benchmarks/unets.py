"""Recipes of published methods for UNets, side by side on the two small UNets that `examples/train_unet_digits.py` trains.

    pip install ".[cpu,metrics]" && python benchmarks/unets.py unet-digits [--networks class text] [--bits w8a8 w6a6 w4a8]

The figures are those of `benchmarks/quality.py`, whose engines these are. A published method is taken as far as options express
it: what it trains is left out, because rounding distill needs a chain of blocks, which a UNet is not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from quality import Bench
from reading import Reader

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
    "per timestep, auto, gptq (ours)": {"rounding": "gptq"},
}
COLUMNS = ("network", "recipe", "SQNR of a call, dB", "worst", "of pictures", "digits read", "MB", "low precision")


def main() -> None:
    """Export and measure; print the rows, and write a result file that `benchmarks/measured.py` reads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of examples/train_unet_digits.py")
    parser.add_argument("--networks", nargs="*", default=["class", "text"], choices=["class", "text"])
    parser.add_argument("--bits", nargs="*", default=["w8a8", "w6a6", "w4a8"])
    parser.add_argument("--count", type=int, default=100, help="digits to draw for reading")
    parser.add_argument("--steps", type=int, default=20, help="of every picture")
    parser.add_argument("--keep", type=Path, help="folder for a strip of twenty digits of every row")
    parser.add_argument("--rows", type=Path, help="also write the table's rows there, as JSON")
    options = parser.parse_args()
    reader, rows = Reader.train(), []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.networks:
            bench = Bench(name, str(options.folder / name), Path(temporary), options, reader)
            read, distance = bench.digits(bench.reference.forward, "PyTorch")
            print(f"{name}: PyTorch float32, {read:.1%} of digits read, Frechet distance {distance:.3f}", flush=True)
            rows.append([name, "PyTorch float32", "", "", "", f"{read:.1%}", "", ""])
            for bits in options.bits:
                for label, values in RECIPES.items():
                    bench.recipe(f"{bits} {label}", {"bits": bits, "steps": options.steps, **SMALL, **PLAIN, **values})
                    rows.append(cells(bench.rows[-1]))
                    if options.rows:
                        options.rows.write_text(json.dumps({"columns": COLUMNS, "rows": rows}, indent=1) + "\n")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    figures = [f"{row[key]:.1f}" for key in ("sqnr", "worst", "pictures")]
    share = f"{row['coverage']:.0%}" if np.isfinite(row["coverage"]) else "-"
    return [row["model"], row["recipe"], *figures, f"{row['read']:.1%}", f"{row['mb']:.2f}", share]


if __name__ == "__main__":
    main()
