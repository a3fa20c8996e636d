"""Block-wise distillation: every block of the quantized network learns to put out what the float network's block does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dq_export.core.artifacts import CalibrationResult

from ..calibrate import measured
from ..collect.statistics import collect_ranges
from ..context import Calibration
from .feeds import FeedFiles
from .outcome import Outcome
from .trainer import Trainer


@dataclass(frozen=True, kw_only=True, eq=False)
class Distillation:
    """A trained calibration.

    Args:
        network: what the trained blocks together brought.
        finish: what training the scales of the whole network brought; None where that was not wanted.
    """

    result: CalibrationResult
    blocks: tuple[Outcome, ...]
    network: Outcome
    finish: Outcome | None


def distill(calibration: Calibration, start: CalibrationResult, finished: Callable[[Outcome], None]) -> Distillation | None:
    """Train the blocks of a calibrated network one after the other: weights, scale tables or clips of tokens, and biases.

    The input of a block is what the quantized and trained blocks before it put out, its target what the float network's
    blocks put out, both from the network's input. A batch mixes timesteps, and each sample reads its own row of a table. A
    training that does not help on samples that took no part in it is not kept: neither that of a block, by the block's
    output, nor all of them together, by the network's.

    Everything between two blocks lies in `calibration.folder`: a run that was killed goes on behind the last finished block,
    and gives the same bytes on a machine with as many threads.

    Processes of a group share the samples: the pictures, each batch of a training, and what is computed of all samples. They
    read and write the same folder. How a batch is shared changes the order of its sums, and with it codes that are near the
    middle between two.

    Args:
        finished: called with each outcome.

    Returns:
        On the first process the result, on the others None.

    Source: DilateQuant (arXiv 2409.14307), sections 3.3 and 3.4 (temporal parallel quantizer, block-wise distillation).

    Raises:
        CalibrationError: see `collect_ranges`; or a file of an earlier run is damaged.
    """
    folder, recipe, denoiser = calibration.folder, calibration.recipe, calibration.denoiser
    feeds = FeedFiles(folder, denoiser.inputs, calibration.sampling)
    statistics = collect_ranges(replace(calibration.calls, record=feeds.record), tuple(start.sites), folder)
    trainer = Trainer(calibration, start, feeds.samples(recipe.distill_samples, recipe.seed))
    result, blocks = start, []
    for index in range(len(denoiser.blocks)):
        outcome, part = trainer.block(index)
        result = _with(result, part)
        blocks.append(outcome)
        finished(outcome)
    network = trainer.network()
    finished(network)
    if not network.kept:
        result = start
    finish = None
    if recipe.finish:
        finish, part = trainer.finish(result)
        result = _with(result, part)
        finished(finish)
    if calibration.group.rank > 0:
        return None
    return Distillation(result=measured(calibration, statistics, result), blocks=tuple(blocks), network=network, finish=finish)


def _with(result: CalibrationResult, part: CalibrationResult) -> CalibrationResult:
    """A result with what a training found."""
    return replace(
        result,
        sites={**result.sites, **part.sites},
        codes={**result.codes, **part.codes},
        correction={**result.correction, **part.correction},
    )
