"""Measures engines whose scales come from some sizes at others: the error of scales at sizes that calibration did not see.

    pip install ".[cpu,text]" && python benchmarks/sizes.py [--model pixart-digits] [--json FILE]

`pixart-digits` is trained at 128 x 128 pixels; at other sizes it draws larger or more digits less well, but its activations
are those of a trained network. Each column exports the model with `--sizes` of its own, each row draws ten pictures of a size
with PyTorch and with the engine, from the same noise: SQNR in dB of a network call, mean and worst, and of the pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from digits import load_model
from result_table import ResultTable

from dq_export.core.network import Feed
from dq_export.core.recipe import Recipe
from dq_export.deploy.onnxruntime.cpu import OrtEngine, open_graph
from dq_export.deploy.parity import difference
from dq_export.families.reference import Float32, Reference
from dq_export.pipeline import run

SIDES = (96, 128, 160, 192, 224, 256)
EXPORTS = {"the size itself": "", "128 and 256": "128x128,256x256", "128 alone": "128x128"}
"""Column -> `--sizes`; empty: an export for each row."""
PICTURES, STEPS, NOISE = 10, 50, 4242


def exported(model: str, sizes: str, out: Path, guidance: float) -> OrtEngine:
    """Export the model with scales from some sizes, and load its engine."""
    values = {"model": model, "sizes": sizes, "guidance_scale": guidance, "min_sqnr": -200, "parity_size": 1}
    run(Recipe.parse(values, "benchmark"), out, until="audit")
    return open_graph(out / "model.onnx")


def figures(reference: Reference, engine: OrtEngine, side: int, guidance: float) -> str:
    """Return the cell of an engine and a size."""
    calls: list[float] = []

    def compared(feed: Feed) -> Float32:
        exact = reference.forward(feed)
        calls.append(difference(exact, engine(feed)).sqnr)
        return exact

    with reference.drawing((side, side)):
        conditions = np.arange(PICTURES) % len(reference.conditions)
        noise = reference.noise(PICTURES, NOISE)
        exact = reference.draw(compared, noise, conditions, steps=STEPS, guidance=guidance)
        pictures = reference.draw(engine, noise, conditions, steps=STEPS, guidance=guidance)
    return f"{np.mean(calls):.1f}, {min(calls):.1f}, {difference(exact, pictures).sqnr:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="pixart-digits")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="write a result file")
    options = parser.parse_args()
    reference = load_model(options.model)
    table = ResultTable(("pixels", *(f"scales of {name}" for name in EXPORTS)), options.json)
    with tempfile.TemporaryDirectory() as temporary:
        shared = {
            name: exported(options.model, sizes, Path(temporary) / sizes, options.guidance)
            for name, sizes in EXPORTS.items()
            if sizes
        }
        for side in SIDES:
            alone = exported(options.model, f"{side}x{side}", Path(temporary) / f"{side}", options.guidance)
            engines = {**dict.fromkeys(EXPORTS, alone), **shared}
            cells = [figures(reference, engine, side, options.guidance) for engine in engines.values()]
            table.add([f"{side} x {side}", *cells])


if __name__ == "__main__":
    main()
