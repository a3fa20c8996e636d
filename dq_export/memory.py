"""How much memory an export will take, before it starts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dq_export.calibration.hessians import PATCH, SPACE
from dq_export.calibration.training.trainer import AT_ONCE
from dq_export.calibration.weights import factor_bytes
from dq_export.core.folding import TEMPORARIES
from dq_export.core.recipe import Recipe, RecipeError

from .families.tensors import stored
from .families.torch_blocks import UNET_LISTS
from .families.weights import Weights

BASE = 0.85
"""GiB of Python, PyTorch, activations and graphs."""
MAPPED = 0.45
"""Copies of the float32 weights for their mapped pages. The system takes such pages back whenever it needs memory, and reads
them again from disk; the fewer stay, the more it reads in each call."""
WEIGHTS = {"calibrate": MAPPED, "verify": 0.5, "bench": 1.5}
"""Copies of the float32 weights, by the stage that takes most: verify holds the engine; bench packs the float graph in a
process beside this one. No stage grows with pictures or steps. In control groups that count every page, PixArt-Σ XL (2.4 GB)
was calibrated and verified in 2.0 GB, in 1.2 times the time, and timed in 4.6 GB, where 3.6 were too little."""
CODES, SIMULATED = 0.25, 1.25
"""Copies of the float32 weights that calibration adds: GPTQ's codes, and the quantized network of progressive calibration."""
TRAINED, SAMPLE = 7.0, 0.28
"""Copies of the largest block's float32 weights that training it takes, and what training keeps of a sample, in such copies:
28 MB in DiT-XL/2's block with 256 tokens."""
SAMPLES = 24 * AT_ONCE
"""Bytes that training keeps of all samples that are computed at once, if it computes more than one."""
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
    checkpoint: Weights, recipe: Recipe, limit: float | None, stages: tuple[str, ...], encoders: int = 0, beside: int = 0
) -> MemoryPlan:
    """All of `stages`, or all but bench, where that alone does not run within `limit` GiB.

    GPTQ's second moments get what the limit leaves, so that a larger one saves runs over the pictures; 1 GiB without a limit.

    Args:
        checkpoint: the network's files of weights.
        encoders: bytes that encoding prompts takes; 0 where nothing is encoded.
        beside: bytes of the float32 weights of a ControlNet, which stay mapped; 0 without one.

    Raises:
        RecipeError: another stage does not fit.
    """
    if limit is None:
        return MemoryPlan(stages=stages)
    if not 0 < limit < math.inf:
        raise RecipeError(f"--max-memory {limit:g}: expected a number of GiB above 0; leave it out for no limit")
    stored_shapes = {name: place.shape for file in checkpoint.files for name, place in stored(file).items()}
    shapes = list(stored_shapes.values())
    weights, base = float32_bytes(checkpoint) / GIB, BASE + MAPPED * beside / GIB
    gigabytes = {stage: base + copies * weights for stage, copies in WEIGHTS.items()}
    if encoders:
        gigabytes["conditions"] = base + MAPPED * weights + encoders / GIB
    if recipe.rounding == "distill":
        gigabytes["distill"] = base + _training(recipe, weights, _largest_block(stored_shapes) / GIB)
    plain, space = gigabytes["calibrate"], SPACE
    if recipe.calibration == "progressive":
        gigabytes["calibrate"] += SIMULATED * weights
    if recipe.first_rounding == "gptq":
        smallest = _widest_work(shapes)
        gigabytes["calibrate"] += CODES * weights
        space = max(smallest, int((limit - gigabytes["calibrate"]) * GIB))
        gigabytes["calibrate"] += smallest / GIB
    exceeding = [stage for stage in stages if gigabytes.get(stage, 0.0) > limit]
    hard = [stage for stage in exceeding if stage != "bench"]
    if hard:
        text = ", ".join(f"{stage} {gigabytes[stage]:.1f} GiB" for stage in hard)
        if hard == ["verify"]:
            advice = "`dq-export build` does without verify"
        elif hard == ["conditions"]:
            advice = "encode the prompts on a larger machine, and pass its conditions.safetensors with --conditions"
        elif hard == ["distill"]:
            advice = "--rounding gptq, or no --finish, needs less"
        elif hard == ["calibrate"] and plain <= limit:
            advice = "--rounding mse and --calibration uniform need less"
        else:
            advice = "no stage needs less: take a larger machine"
        raise RecipeError(f"--max-memory {limit:g}: {text} will not fit; {advice}")
    return MemoryPlan(stages=tuple(stage for stage in stages if stage not in exceeding), space=space)


def float32_bytes(weights: Weights) -> int:
    """Bytes of a network's weights in float32."""
    return sum(4 * math.prod(place.shape) for file in weights.files for place in stored(file).values())


def _training(recipe: Recipe, weights: float, block: float) -> float:
    """Return GiB of training, from GiB of the network's and of the largest block's float32 weights.

    The greatest of three: the training of a block, all codes at the end, and the finish.
    """
    samples = max(SAMPLE * block, min(recipe.distill_batch * SAMPLE * block, SAMPLES / GIB))
    phases = [TRAINED * block + samples, CODES * weights]
    if recipe.finish:
        phases.append((1.0 + CODES + samples / max(block, 1 / GIB)) * weights)
    return weights + max(phases)


def _widest_work(shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes of rounding the linear or convolution of the most inputs by its second moments."""
    weights = [shape for shape in shapes if len(shape) in (2, 4)]
    widths = [math.prod(shape[1:]) for shape in weights if len(shape) == 2 or math.prod(shape[1:]) <= PATCH]
    return factor_bytes(max(widths)) + TEMPORARIES * 4 * max(math.prod(shape) for shape in weights)


def _largest_block(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the float32 weights of the largest block: a numbered part of a list at the top, or of a list in a UNet's level."""
    blocks: dict[str, int] = {}
    for name, shape in shapes.items():
        block = re.match(rf"\w+(\.\d+)?\.({'|'.join(UNET_LISTS)})\.\d+\.", name) or re.match(r"\w+\.\d+\.", name)
        if block:
            blocks[block[0]] = blocks.get(block[0], 0) + 4 * math.prod(shape)
    return max(blocks.values(), default=0)
