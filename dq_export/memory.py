"""How much memory an export will take, before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dq_export.calibration.hessians import SPACE
from dq_export.calibration.weights import factor_bytes
from dq_export.core.folding import TEMPORARIES
from dq_export.core.recipe import Recipe, RecipeError

from .families.tensors import stored
from .families.weights import Weights

BASE = 0.85
"""GiB of Python, PyTorch, activations and graphs."""
WEIGHTS = {"calibrate": 1.0, "verify": 1.05, "bench": 1.1}
"""Copies of the float32 weights, by the stage that takes most: PyTorch and ONNX Runtime each map one, in turn; bench holds
the float graph, packed, in a process beside this one. Measured at 3 GB; no stage grows with pictures or steps."""
CODES, SIMULATED = 0.25, 1.25
"""Copies of the float32 weights that calibration adds: GPTQ's codes, and the quantized network of progressive calibration."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What an export does within its memory.

    Args:
        stages: that it runs, in order.
        space: bytes of second moments, for `calibrate`.
    """

    stages: tuple[str, ...]
    space: int = SPACE


def plan_memory(
    checkpoint: Weights, recipe: Recipe, limit: float | None, wanted: tuple[str, ...], encoders: int = 0
) -> MemoryPlan:
    """All stages of `wanted`, or all but bench, where that alone does not run within `limit` GiB.

    GPTQ's second moments get what the limit leaves, so that a larger one saves runs over the pictures; 1 GiB without a limit.

    Args:
        checkpoint: the network's files of weights.
        encoders: bytes that encoding prompts takes; 0 where nothing is encoded.

    Raises:
        RecipeError: another stage does not fit.
    """
    if limit is None:
        return MemoryPlan(stages=wanted)
    if not 0 < limit < math.inf:
        raise RecipeError(f"--max-memory {limit:g}: expected a number of GiB above 0; leave it out for no limit")
    shapes = [place.shape for file in checkpoint.files for place in stored(file).values()]
    weights = sum(4 * math.prod(shape) for shape in shapes) / GIB
    needed = {stage: BASE + copies * weights for stage, copies in WEIGHTS.items()}
    if encoders:
        needed["conditions"] = BASE + weights + encoders / GIB
    plain, space = needed["calibrate"], SPACE
    if recipe.calibration == "progressive":
        needed["calibrate"] += SIMULATED * weights
    if recipe.rounding == "gptq":
        least = _widest_work(shapes)
        needed["calibrate"] += CODES * weights
        space = max(least, int((limit - needed["calibrate"]) * GIB))
        needed["calibrate"] += least / GIB
    over = [stage for stage in wanted if needed.get(stage, 0.0) > limit]
    hard = [stage for stage in over if stage != "bench"]
    if hard:
        listed = ", ".join(f"{stage} {needed[stage]:.1f} GiB" for stage in hard)
        if hard == ["verify"]:
            advice = "`dq-export build` does without verify"
        elif hard == ["conditions"]:
            advice = "encode the prompts on a larger machine, and pass its conditions.safetensors with --conditions"
        elif hard == ["calibrate"] and plain <= limit:
            advice = "--rounding mse and --calibration uniform need less"
        else:
            advice = "no stage needs less: take a larger machine"
        raise RecipeError(f"--max-memory {limit:g}: {listed} will not fit; {advice}")
    return MemoryPlan(stages=tuple(stage for stage in wanted if stage not in over), space=space)


def _widest_work(shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes of rounding the linear of the most inputs by its second moments."""
    matrices = [shape for shape in shapes if len(shape) == 2]
    return factor_bytes(max(width for _, width in matrices)) + TEMPORARIES * 4 * max(math.prod(shape) for shape in matrices)
