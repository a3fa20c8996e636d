"""Block-wise distillation: every block of the quantized network is trained to give the float network's output."""

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
        blocks: the outcome of each block's training.
        network: the outcome of all trained blocks together.
        finish: the outcome of training the scales of the whole network; None if the recipe does not ask for it.
    """

    result: CalibrationResult
    blocks: tuple[Outcome, ...]
    network: Outcome
    finish: Outcome | None


def distill(calibration: Calibration, start: CalibrationResult, report: Callable[[Outcome], None]) -> Distillation | None:
    """Train the blocks of a calibrated network one after the other: weights, scale tables or clips of tokens, and biases.

    The input of a block is the output of the quantized and trained blocks before it. Its target is the output of the float
    network's block. Both start from the network's input. A batch mixes timesteps, and each sample uses its own row of a table.
    The result of a training is kept only if it helps on samples that were not trained on. For a block this is measured at the
    block's output, for all blocks together at the network's output.

    The state between two blocks is on disk in `calibration.folder`. A killed run continues after the last finished block, and
    gives the same bytes on a machine with the same number of threads.

    Processes of a group share the pictures, each batch of a training, and computations on all samples. They read and write the
    same folder. The number of processes changes the order of sums in a batch, and with it codes near the middle between two.

    Args:
    start: the calibration whose blocks are trained.
    report: called with each outcome.

    Returns:
    The result on the first process, and None on the others.

    Source: DilateQuant (arXiv 2409.14307), sections 3.3 and 3.4 (temporal parallel quantizer, block-wise distillation).

    Raises:
        CalibrationError: see `collect_ranges`, or a file of an earlier run is damaged.
    """
    folder, recipe, denoiser = calibration.folder, calibration.recipe, calibration.denoiser
    # Along a trajectory the first states are nearly one noise: few pictures are few samples there, and training overfits them.
    sampling = replace(calibration.sampling, calib_size=max(recipe.calib_size, recipe.distill_pictures))
    feeds = FeedFiles(folder, denoiser.inputs, sampling)
    calls = replace(calibration.calls, sampling=sampling, record=feeds.record)
    statistics = collect_ranges(calls, tuple(start.sites), folder)
    trainer = Trainer(calibration, start, feeds.samples(recipe.distill_samples, recipe.seed))
    result, blocks = start, []
    for index in range(len(denoiser.blocks)):
        outcome, _ = trainer.block(index)
        blocks.append(outcome)
        report(outcome)
    network = trainer.network()
    report(network)
    if network.kept:  # until now the trained codes were on disk alone
        for index in range(len(denoiser.blocks)):
            result = _with(result, trainer.block(index)[1])
    finish = None
    if recipe.finish:
        finish, part = trainer.finish(result)
        result = _with(result, part)
        report(finish)
    if calibration.group.rank > 0:
        return None
    return Distillation(result=measured(calibration, statistics, result), blocks=tuple(blocks), network=network, finish=finish)


def _with(result: CalibrationResult, part: CalibrationResult) -> CalibrationResult:
    """Return a result with the trained parts of another."""
    return replace(
        result,
        sites={**result.sites, **part.sites},
        codes={**result.codes, **part.codes},
        correction={**result.correction, **part.correction},
    )
