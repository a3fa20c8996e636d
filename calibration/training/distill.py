"""Block-wise distillation: every block of the quantized network learns to put out what the float network's block does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.compare import decibels
from dq_export.core.network import Chain

from ..calibrate import measured
from ..collect.statistics import collect_ranges
from ..context import Calibration
from .block import BlockTask
from .boundary import Boundary
from .feeds import FeedFiles, Samples
from .network import Layers, QuantizedNetwork
from .outcome import BlockOutcome

if TYPE_CHECKING:
    import torch

Int64 = npt.NDArray[np.int64]


def distill(
    calibration: Calibration, start: CalibrationResult, finished: Callable[[BlockOutcome], None]
) -> tuple[CalibrationResult, list[BlockOutcome]]:
    """Train the blocks of a calibrated network one after the other: weights, scale tables or clips of tokens, and biases.

    The input of a block is what the quantized and trained blocks before it put out, its target what the float network's
    blocks put out, both from the network's input. A batch mixes timesteps, and each sample reads its own row of a table. A
    training that does not help on samples that took no part in it is not kept.

    Everything between two blocks lies in `calibration.folder`: a run that was killed goes on behind the last finished block,
    and gives the same bytes on a machine with as many threads.

    Args:
        finished: called with each block's outcome.

    Source: DilateQuant (arXiv 2409.14307), sections 3.3 and 3.4 (temporal parallel quantizer, block-wise distillation).

    Raises:
        CalibrationError: see `collect_ranges`; or a file of an earlier run is damaged.
    """
    folder, recipe, denoiser = calibration.folder, calibration.recipe, calibration.denoiser
    feeds = FeedFiles(folder, denoiser.inputs, calibration.sampling)
    statistics = collect_ranges(replace(calibration.calls, record=feeds.record), tuple(start.sites), folder)
    samples = feeds.samples(recipe.distill_samples, recipe.seed)
    trainer = _Trainer(calibration, start, samples)
    result, outcomes = start, []
    for index, block in enumerate(denoiser.blocks):
        part = trainer.block(index)
        result = replace(
            result,
            sites={**result.sites, **part.sites},
            codes={**result.codes, **part.codes},
            correction={**result.correction, **part.correction},
        )
        outcomes.append(_outcome(block, part))
        finished(outcomes[-1])
    return measured(calibration, statistics, result), outcomes


class _Trainer:
    """Trains block after block; what lies between two of them is on disk."""

    def __init__(self, calibration: Calibration, start: CalibrationResult, samples: Samples) -> None:
        self.calibration, self.start, self.samples = calibration, start, samples
        self.names = calibration.denoiser.blocks
        self.everything = np.arange(len(samples))
        self.chain: Chain = calibration.denoiser.chain(samples.feed(self.everything[:2]))
        self.device = self.chain.device
        self.network = QuantizedNetwork(calibration.denoiser, start, calibration.assigned, self.chain)

    def block(self, index: int) -> CalibrationResult:
        """The part of the result that a block brings: of an earlier run's file, or trained now."""
        path = self.calibration.folder / f"block.{index}.safetensors"
        if path.exists():
            return CalibrationResult.load(path)
        self._float_outputs(index)
        part, layers = self._trained(index)
        if index + 1 < len(self.names):
            self._advance(index, layers)
        new = path.with_suffix(".new")
        part.save(new)
        new.replace(path)
        for kind in ("exact", "error"):
            self._path(index, kind).unlink(missing_ok=True)
        return part

    def _trained(self, index: int) -> tuple[CalibrationResult, Layers]:
        """The block's part of the result, and the layers that its successor's input comes from."""
        name, samples, recipe = self.names[index], self.samples, self.calibration.recipe
        task = BlockTask(
            run=lambda layers, rows: self._run(index, layers, rows),
            target=self._boundary(index + 1, "exact").read,
            timestep=samples.timestep,
            held_back=samples.held_back,
            recipe=recipe,
            seed=(recipe.seed, index),
        )
        judges, kept = np.flatnonzero(samples.held_back), self.network.layers(name, trained=False)
        noise, signal = task.errors(kept, judges)
        weights = task.weights(noise, judges)
        counts = weights[judges]
        before = float(decibels(signal @ counts, noise @ counts))
        if not self.network.trainable(name):
            return _part(before, before, kept=False), kept
        layers = self.network.layers(name, trained=True)
        done, total = index * recipe.distill_iterations, len(self.names) * recipe.distill_iterations
        task.train(layers, weights, lambda now: self.calibration.progress(done + now, total, "iterations"))
        found, _ = task.errors(layers, judges)
        after = float(decibels(signal @ counts, found @ counts))
        if after > before:  # not of a training that diverged, which decibels puts at the bottom
            return _part(before, after, kept=True, of=layers.found(self.start)), layers
        return _part(before, after, kept=False), kept

    def _run(self, index: int, layers: Layers, rows: Int64) -> tuple[torch.Tensor, ...]:
        """What the quantized block puts out for some samples, from the quantized chain's input."""
        self.network.at(self.samples.timestep[rows])
        layers.forget()
        before: list[torch.Tensor] = []
        if index:
            exact, error = (self._boundary(index, kind).read(rows) for kind in ("exact", "error"))
            before = [(a + b).to(self.device) for a, b in zip(exact, error, strict=True)]
        with self.network.on(layers):
            return self.chain.run(index, self.samples.feed(rows), before)

    def _float_outputs(self, index: int) -> None:
        """Write what the float chain's block puts out."""
        import torch

        target = self._boundary(index + 1, "exact")
        with torch.no_grad():
            for rows in self._parts():
                before = [part.to(self.device) for part in self._boundary(index, "exact").read(rows)] if index else []
                target.write(rows, self.chain.run(index, self.samples.feed(rows), before))

    def _advance(self, index: int, layers: Layers) -> None:
        """Write how far from the float chain's the quantized chain's output is: small numbers, which float16 holds well."""
        import torch

        exact, error = (self._boundary(index + 1, kind) for kind in ("exact", "error"))
        with torch.no_grad():
            for rows in self._parts():
                found = self._run(index, layers, rows)
                error.write(rows, [a.cpu() - b for a, b in zip(found, exact.read(rows), strict=True)])

    def _parts(self) -> list[Int64]:
        size = self.calibration.recipe.distill_batch
        return [np.arange(i, min(i + size, len(self.samples))) for i in range(0, len(self.samples), size)]

    def _boundary(self, index: int, kind: str) -> Boundary:
        """Between block `index - 1` and block `index`: the float chain's tensors, or how far the quantized chain's are away."""
        return Boundary(self._path(index, kind), self.chain.shapes[index - 1])

    def _path(self, index: int, kind: str) -> Path:
        return self.calibration.folder / f"{kind}.{index}"


def _part(before: float, after: float, *, kept: bool, of: CalibrationResult | None = None) -> CalibrationResult:
    """The part of a result that a block brings, with what came of its training."""
    part = of or CalibrationResult(sites={}, weight_scale={}, provenance={})
    return replace(part, provenance={"before": repr(before), "after": repr(after), "kept": "yes" if kept else ""})


def _outcome(name: str, part: CalibrationResult) -> BlockOutcome:
    said = part.provenance
    return BlockOutcome(name=name, before=float(said["before"]), after=float(said["after"]), kept=bool(said["kept"]))
