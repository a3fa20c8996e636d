"""Trains block after block. The tensors between two blocks are on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.compare import decibels
from dq_export.core.network import Chain

from ..context import Calibration
from .boundary import Boundary
from .feeds import Samples
from .layers import Training
from .network import Layers, QuantizedNetwork
from .outcome import Outcome
from .task import Effort, Task, own_parts, squares

if TYPE_CHECKING:
    import torch

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Trained = tuple[Outcome, CalibrationResult]
"""The outcome of a training, and the trained part of a calibration; the part is empty if it is not kept."""
NETWORK, FINISH = "the network", "the finish"
AT_ONCE = 10 << 20
"""Bytes of a block's output that are computed at once on a CPU. Training keeps 24 times as much of DiT's blocks: 450 MB at
DiT-XL/2 with all 16 samples of a batch, and 225 MB with the 8 that this number allows."""


class Trainer:
    """Trains block after block, and then the scales of all blocks.

    Three chains run through the blocks from the network's input. `exact` is the float network's output, `error` the difference
    of the trained network from it, and `first` the difference of the network before training, for the samples that judge.
    """

    def __init__(self, calibration: Calibration, start: CalibrationResult, samples: Samples) -> None:
        self.calibration, self.start, self.samples, self.group = calibration, start, samples, calibration.group
        self.names = calibration.denoiser.blocks
        self.all_samples, self.judges = np.arange(len(samples)), np.flatnonzero(samples.held_back)
        self.chain: Chain = calibration.denoiser.chain(samples.feed(self.all_samples[:2]))
        self.quantized = QuantizedNetwork(calibration.denoiser, start, calibration.assigned, self.chain)
        self.part = part_of(self.chain, calibration.recipe.distill_batch)

    def block(self, index: int) -> Trained:
        """Train a block, or read its outcome from an earlier run's file."""
        trained = self._once(f"block.{index}", self.names[index], lambda: self._block(index))
        if self.group.rank == 0:  # only after the block's file is written, from which a killed run continues
            for source in self.chain.sources[index]:
                if not any(source in sources for sources in self.chain.sources[index + 1 :]):
                    for kind in ("exact", "error", "first"):
                        self._path(source + 1, kind).unlink(missing_ok=True)
        return trained

    def network(self) -> Outcome:
        """Return the outcome of all trained blocks together: the mean SQNR of a call over the timesteps."""
        _, place = np.unique(self.samples.timestep[self.judges], return_inverse=True)
        exact, *errors = (np.bincount(place, self._powers(kind)) for kind in ("exact", "first", "error"))
        before, after = (float(decibels(exact, error).mean()) for error in errors)
        return Outcome(name=NETWORK, before=before, after=after, kept=after >= before)

    def finish(self, result: CalibrationResult) -> Trained:
        """Train all scales and biases of a result by the network's output."""
        return self._once("finish", FINISH, lambda: self._finish(result))

    def _once(self, file: str, name: str, train: Callable[[], Trained]) -> Trained:
        path = self.calibration.folder / f"{file}.safetensors"
        missing = self.group.rank == 0 and not path.exists()
        if self.group.largest(np.asarray([float(missing)])).any():  # the first process decides, and only it writes
            outcome, part = train()
            notes = {"before": repr(outcome.before), "after": repr(outcome.after), "kept": "yes" if outcome.kept else ""}
            if self.group.rank == 0:
                new = path.with_suffix(".new")
                replace(part, provenance=notes).save(new)
                new.replace(path)
            self._meet()
        part = CalibrationResult.load(path)
        notes = dict(part.provenance)
        return Outcome(name=name, before=float(notes["before"]), after=float(notes["after"]), kept=bool(notes["kept"])), part

    def _block(self, index: int) -> Trained:
        name = self.names[index]
        self._float_outputs(index)
        self._advance(index, self.quantized.layers(name, "nothing"), "first", self.judges)
        training: Training = "all" if self.quantized.trainable(name) else "nothing"
        make = partial(self.quantized.layers, name)
        outcome, layers = self._trained(self._task(index), make, training, len(self.names), index)
        self._advance(index, layers, "error", self.all_samples)
        return outcome, self._part(outcome, layers, self.start)

    def _finish(self, result: CalibrationResult) -> Trained:
        network = QuantizedNetwork(self.calibration.denoiser, result, self.calibration.assigned, self.chain)

        def run(layers: Layers, rows: Int64) -> tuple[torch.Tensor, ...]:
            network.at(self.samples.timestep[rows])
            layers.forget()
            with network.on(layers):
                return self.chain.whole(self.samples.feed(rows))

        last = len(self.names)
        task = replace(self._task(last - 1), run=run, effort=Effort.of_finish(self.calibration.recipe))
        outcome, layers = self._trained(task, network.all_layers, "scales", 1, 0)
        return outcome, self._part(outcome, layers, result)

    def _trained(
        self, task: Task, make: Callable[[Training], Layers], training: Training, tasks: int, place: int
    ) -> tuple[Outcome, Layers]:
        """Train for a task, and return its outcome and the layers that are better on the samples that judge.

        Args:
            make: makes the layers with the values from before the training. One set of layers is in memory at a time.
            tasks, place: number of equal tasks, and the index of this one, for the progress.
        """
        layers = make("nothing")
        noise, signal = task.errors(layers, self.judges)
        weights = task.weights(noise, self.judges)
        counts = weights[self.judges]
        before = float(decibels(signal @ counts, noise @ counts))
        if training == "nothing":
            return Outcome(name="", before=before, after=before, kept=False), layers
        del layers
        layers = make(training)
        first, total = place * task.effort.iterations, tasks * task.effort.iterations
        task.train(layers, weights, lambda count: self.calibration.progress(first + count, total, "iterations"))
        noise, _ = task.errors(layers, self.judges)
        after = float(decibels(signal @ counts, noise @ counts))
        better = after > before  # False also if the training diverged: decibels gives NaN and Inf the lowest value
        return Outcome(name="", before=before, after=after, kept=better), layers if better else make("nothing")

    def _part(self, outcome: Outcome, layers: Layers, start: CalibrationResult) -> CalibrationResult:
        """Return the trained part of a result; empty if it is not kept."""
        return layers.result(start) if outcome.kept else CalibrationResult(sites={}, weight_scale={}, provenance={})

    def _task(self, index: int) -> Task:
        """Return the task of a block."""
        recipe = self.calibration.recipe
        return Task(
            run=lambda layers, rows: self._run(index, layers, "error", rows),
            target=self._boundary(index + 1, "exact").read,
            timestep=self.samples.timestep,
            held_back=self.samples.held_back,
            effort=Effort.of_block(recipe),
            part=self.part,
            seed=(recipe.seed, index),
            group=self.group,
        )

    def _run(self, index: int, layers: Layers, kind: str, rows: Int64) -> tuple[torch.Tensor, ...]:
        """Compute the quantized block's output for some samples, from the input of a quantized chain."""
        self.quantized.at(self.samples.timestep[rows])
        layers.forget()
        exact, error = (self._before(index, part, rows) for part in ("exact", kind))
        before = [a + b for a, b in zip(exact, error, strict=True)]
        with self.quantized.on(layers):
            return self.chain.run(index, self.samples.feed(rows), before)

    def _before(self, index: int, kind: str, rows: Int64) -> list[torch.Tensor]:
        """Return the tensors of a chain that a block reads, of some samples."""
        return [tensor for source in self.chain.sources[index] for tensor in self._boundary(source + 1, kind).read(rows)]

    def _powers(self, kind: str) -> Float64:
        """Return the sum of squares after the last block of each sample that judges, float64[judges]."""
        boundary = self._boundary(len(self.names), kind)
        parts = (boundary.read(rows) for rows in self._parts(self.judges))
        return np.concatenate([squares([tensor.double() for tensor in part]) for part in parts])

    def _float_outputs(self, index: int) -> None:
        """Write the output of the float chain's block."""
        import torch

        target = self._boundary(index + 1, "exact")
        with torch.no_grad():
            for rows in own_parts(self._parts(self.all_samples), self.group):
                target.write(rows, self.chain.run(index, self.samples.feed(rows), self._before(index, "exact", rows)))
        self._meet()

    def _advance(self, index: int, layers: Layers, kind: str, samples: Int64) -> None:
        """Write the difference of a quantized chain's output from the float chain's. Small numbers are precise in float16."""
        import torch

        exact, error = (self._boundary(index + 1, part) for part in ("exact", kind))
        with torch.no_grad():
            for rows in own_parts(self._parts(samples), self.group):
                outputs = self._run(index, layers, kind, rows)
                error.write(rows, [a - b for a, b in zip(outputs, exact.read(rows), strict=True)])
        self._meet()

    def _meet(self) -> None:
        """Wait until every process has written its share."""
        self.group.largest(np.zeros(1))

    def _parts(self, samples: Int64) -> Sequence[Int64]:
        return [samples[i : i + self.part] for i in range(0, len(samples), self.part)]

    def _boundary(self, index: int, kind: str) -> Boundary:
        """Return the file of a chain's tensors after block `index - 1`."""
        return Boundary(self._path(index, kind), self.chain.shapes[index - 1], self.chain.device)

    def _path(self, index: int, kind: str) -> Path:
        return self.calibration.folder / f"{kind}.{index}"


def part_of(chain: Chain, batch: int) -> int:
    """Return the number of samples that are computed at once: a batch on a GPU, which holds a whole batch faster than parts."""
    if chain.device.type != "cpu":
        return batch
    largest = max(sum(4 * math.prod(shape) for shape in shapes) for shapes in chain.shapes)
    return min(batch, max(1, AT_ONCE // largest))
