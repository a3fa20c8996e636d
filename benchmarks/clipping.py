"""Measures what clipping low-bit activations does to calls and to pictures, for a table in docs/measured.md.

    pip install ".[cpu,metrics]" && python benchmarks/clipping.py [--models NAME ...] [--bits w6a6 w4a4] [--json FILE]

Rows: no clipping, the share of the range with the least error of the layer's output, and what `--scaling auto` does. All round
weights with GPTQ and have scales by timestep. The figures are those of `benchmarks/distill.py`: SQNR in dB against PyTorch.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from distill import measure
from result_table import ResultTable

from dq_export.calibration import scaling


class Clipping(NamedTuple):
    """Values of the constants of `calibration.scaling`."""

    below: int
    coherent: float


CLIPPINGS = {
    "none": Clipping(below=0, coherent=1),
    "least error": Clipping(below=8, coherent=1),
    "auto": Clipping(scaling.CLIPPED_BELOW, scaling.COHERENT),
}
COLUMNS = ("model", "bits", "clipping", "mean of the calls, dB", "worst call", "mean of 40 pictures", "worst picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["dit-digits", "pixart-digits"], choices=["dit-digits", "pixart-digits"])
    parser.add_argument("--bits", nargs="*", default=["w6a6", "w4a4"])
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    table = ResultTable(COLUMNS, options.json)
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.models:
            for bits in options.bits:
                recipe = {"bits": bits, "granularity": "tensor", "rounding": "gptq"}
                for label, values in CLIPPINGS.items():
                    folder = Path(temporary) / model / bits / label
                    with patch.multiple(scaling, CLIPPED_BELOW=values.below, COHERENT=values.coherent):
                        figures = measure(model, recipe, folder, "cpu")
                    pictures = figures.pictures
                    cells = [f"{value:.1f}" for value in (figures.mean, figures.worst, pictures.mean(), pictures.min())]
                    table.add([model, bits, label, *cells])


if __name__ == "__main__":
    main()
