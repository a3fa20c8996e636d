"""How much memory an export will take, before it starts."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dq_export.calibration.recipe import RecipeError

from .families.reference import transformer_folder

BASE = 0.75
"""GiB of Python, PyTorch, activations and graphs."""
WEIGHTS = {"calibrate": 1.0, "verify": 1.2, "bench": 1.55}
"""Copies of the float32 weights, by the stage that takes most: PyTorch maps one; ONNX Runtime transposes and packs its
own; bench holds the float graph and the engine. Measured at 3 GB of weights; no stage grows with pictures or steps."""
GIB = 2**30


def estimate(folder: Path) -> dict[str, float]:
    """GiB at the peak of each of the large stages, from the checkpoint's headers.

    Args:
        folder: a diffusers folder.
    """
    weights = _float_bytes(transformer_folder(folder)) / GIB
    return {stage: BASE + copies * weights for stage, copies in WEIGHTS.items()}


def fitting(folder: Path, limit: float | None, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The stages of `wanted` that run within `limit` GiB: all of them, or all but bench.

    Raises:
        RecipeError: another one does not fit.
    """
    if limit is None:
        return wanted
    needed = estimate(folder)
    over = [stage for stage in wanted if needed.get(stage, 0.0) > limit]
    hard = [stage for stage in over if stage != "bench"]
    if hard:
        listed = ", ".join(f"{stage} {needed[stage]:.1f} GiB" for stage in hard)
        advice = "`dq-export build` does without verify" if hard == ["verify"] else "no stage needs less: take a larger machine"
        raise RecipeError(f"--max-memory {limit:g}: {listed} will not fit; {advice}")
    return tuple(stage for stage in wanted if stage not in over)


def _float_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        total += sum(4 * math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
