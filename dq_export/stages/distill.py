"""The stage `distill`: blocks that are trained against the float network's, behind a calibration that rounds by GPTQ."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dq_export.calibration.group import ProcessGroup
from dq_export.calibration.training.outcome import Outcome
from dq_export.core.documents import DocumentError, read_text
from dq_export.core.idle_options import TRAINING_FIELDS
from dq_export.core.recipe import Recipe
from dq_export.core.stored_codes import load_without_codes

from ..heap import return_freed_memory
from ..output_folder import TRAINING, remove, write_text
from ..report.report import Part
from .calibrate import (
    CALIBRATE,
    CALIBRATION,
    Calibrated,
    announce,
    announced,
    calibration_beside,
    calibration_of,
)
from .conditions import ENCODE
from .stage import Context, Prepared, Stage

DISTILLED = "distilled.safetensors"
"""Its file in an output folder, in the format of `calibration.safetensors`."""
KEY = "key"
"""What a folder of unfinished training is of, a file in it."""


class TrainedPart(Part):
    """What the training of a block, or of the whole network, brought, on samples that took no part in it.

    Args:
        before, after: dB of its output against the float network's.
        kept: whether what was trained is exported.
    """

    name: str
    before: float = Field(allow_inf_nan=False)
    after: float = Field(allow_inf_nan=False)
    kept: bool


class Distilled(Calibrated):
    """What later stages and the report need of a trained calibration."""

    blocks: tuple[TrainedPart, ...] = ()
    network: TrainedPart | None = None
    finish: TrainedPart | None = None


@dataclass(frozen=True)
class Distill(Stage[Distilled]):
    """Trains block after block."""

    name: str = "distill"
    result: type[Distilled] = Distilled
    fields: tuple[str, ...] = (*TRAINING_FIELDS, "calib_size", "steps", "guidance_scale", "sizes", "seed")
    needs: tuple[Stage[Any], ...] = (ENCODE, CALIBRATE)
    network: bool = True

    def applies(self, context: Context) -> bool:
        """Where the recipe's rounding is `distill`."""
        return context.recipe.rounding == "distill"

    def text(self, context: Context) -> str:
        """How many blocks, and how long each is trained."""
        blocks = context.reference.blocks
        return f"{len(blocks)} blocks, {context.recipe.distill_iterations} iterations each"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The file of scales and codes."""
        return (DISTILLED,)

    def also(self, context: Context) -> dict[str, Any]:
        """The checkpoint, and what the rules decide."""
        return {"model": context.reference.digest, "schemes": context.schemes}

    def run(self, context: Context, target: Path) -> Distilled:
        """Write `distilled.safetensors`. What is trained so far lies in a folder of its own, which a later run continues."""
        from dq_export.calibration.training.distill import distill

        start = load_without_codes(context.folder / CALIBRATION)
        folder = context.folder / TRAINING
        key = hashlib.sha256(json.dumps(self.inputs(context), sort_keys=True).encode()).hexdigest()
        continue_with(folder, key)

        def finished(outcome: Outcome) -> None:
            better = "" if outcome.kept else ", kept as it was"
            context.progress.begin(self.name, f"{outcome.name}: {outcome.before:.1f} -> {outcome.after:.1f} dB{better}")
            return_freed_memory()

        announce(context.group, work=True)
        with context.reference.on(context.device):
            distilled = distill(calibration_of(context, folder), start, finished)
        assert distilled is not None  # the first process gets it
        distilled.result.save(target / DISTILLED)
        remove(folder)
        blocks = tuple(map(_reported, distilled.blocks))
        network = _reported(distilled.network)
        finish = None if distilled.finish is None else _reported(distilled.finish)
        better = [block for block in blocks if block.kept]
        gain = sum(block.after - block.before for block in better) / max(len(better), 1)
        summary = f"{len(better)} of {len(blocks)} blocks are better, by {gain:.1f} dB on average"
        if better and not network.kept:
            summary += ", but not the network with them: all are exported as they were"
        summarized = {**dict(Calibrated.of(distilled.result)), "summary": summary}
        return Distilled(**summarized, blocks=blocks, network=network, finish=finish)

    def reuse(self, context: Context) -> None:
        """Send the other processes home."""
        announce(context.group, work=False)


DISTILL = Distill()


def assist_training(prepared: Prepared, folder: Path, group: ProcessGroup, device: str) -> None:
    """Take this process's share of the training, if the first process announces one.

    Args:
        folder: the output folder, to which only the first process writes its results.
    """
    from dq_export.calibration.training.distill import distill

    if announced(group):
        start = load_without_codes(folder / CALIBRATION)
        with prepared.reference.on(device):
            distill(calibration_beside(prepared, folder, folder / TRAINING, group), start, lambda outcome: None)


def _reported(outcome: Outcome) -> TrainedPart:
    return TrainedPart(**vars(outcome))


def decided(recipe: Recipe) -> str:
    """The file that holds what an export quantizes with."""
    return DISTILLED if recipe.rounding == "distill" else CALIBRATION


def continue_with(folder: Path, key: str) -> None:
    """Leave in a folder what an earlier run of the same key put there, and nothing else."""
    try:
        same = read_text(folder / KEY, links=False) == key
    except DocumentError:
        same = False
    if not same:
        remove(folder)
        folder.mkdir()
        write_text(folder / KEY, key)
