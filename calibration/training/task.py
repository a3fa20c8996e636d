"""The training of one block, or of the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from dq_export.core.recipe import Recipe

from ..group import ProcessGroup
from .network import Layers

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
BETAS = (0.9, 0.99)
WARM_UP, LAST = 0.1, 0.02
"""Share of the iterations in which the rates rise, and share of the peak rate at the end, after half a cosine."""
GENTLE = 0.05
"""Rates of the whole network relative to a block's. With rates ten times as large it gets worse."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Duration and rates of a training.

    Args:
        batch: number of samples of an iteration.
        rates: greatest rates of `weight`, `scale` and `bias`, in steps of codes.
    """

    iterations: int
    batch: int
    rates: Mapping[str, float]

    @staticmethod
    def of_block(recipe: Recipe) -> Effort:
        """Return the effort for a block."""
        rates = {"weight": recipe.distill_rate, "scale": recipe.distill_scale_rate, "bias": recipe.distill_bias_rate}
        return Effort(iterations=recipe.distill_iterations, batch=recipe.distill_batch, rates=rates)

    @staticmethod
    def of_finish(recipe: Recipe) -> Effort:
        """Return the effort for the whole network, whose weights are not trained."""
        rates = {kind: GENTLE * rate for kind, rate in Effort.of_block(recipe).rates.items()}
        return Effort(iterations=recipe.finish, batch=recipe.distill_batch, rates=rates)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """The training of a block or of the whole network.

    Args:
        run: computes the quantized block's output for some samples with these layers, from the input of the quantized chain.
        target: returns the float block's output for some samples.
        timestep: float64[N], timesteps of all samples.
        held_back: bool[N], the samples that judge.
        part: number of samples that are computed at once; a batch is the sum of its parts.
        seed: seed of the random batches.
        group: the processes that share the samples of a batch and the samples that judge.
    """

    run: Callable[[Layers, Int64], tuple[torch.Tensor, ...]]
    target: Callable[[Int64], Sequence[torch.Tensor]]
    timestep: Float64
    held_back: npt.NDArray[np.bool_]
    effort: Effort
    part: int
    seed: tuple[int, ...]
    group: ProcessGroup

    def errors(self, layers: Layers, rows: Int64) -> tuple[Float64, Float64]:
        """Return (noise, signal), each float64[len(rows)]: sums of squares of each sample's error and of its target."""
        import torch

        sums = np.zeros((2, len(rows)))
        with torch.no_grad():
            for start in own_parts(range(0, len(rows), self.part), self.group):
                part = slice(start, start + self.part)
                exact = [tensor.double() for tensor in self.target(rows[part])]
                sums[0, part] = squares([a - b for a, b in zip(self.run(layers, rows[part]), exact, strict=True)])
                sums[1, part] = squares(exact)
        noise, signal = self.group.total(sums)
        return noise, signal

    def weights(self, noise: Float64, rows: Int64) -> Float64:
        """Return the weight of each sample, float64[N]: the inverse of its timestep's mean noise at the start."""
        times, place = np.unique(self.timestep[rows], return_inverse=True)
        mean = np.bincount(place, noise) / np.bincount(place)
        weights: Float64 = np.interp(self.timestep, times, 1 / np.maximum(mean, 1e-12 * mean.max() + 1e-30))
        return weights

    def train(self, layers: Layers, weights: Float64, progress: Callable[[int], None]) -> None:
        """Train layers in place. Each process computes the gradients of its share of a batch, and applies the sum of all shares.

        Args:
            weights: weight of each sample in the loss.
            progress: called with the number of finished iterations.
        """
        import torch

        iterations = self.effort.iterations
        optimizer = torch.optim.Adam(layers.parameters(self.effort.rates), lr=0.0, betas=BETAS)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        batches = _batches(np.flatnonzero(~self.held_back), self.effort.batch, self.seed)
        for iteration in range(iterations):
            rows = np.array_split(next(batches), self.group.size)[self.group.rank]
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share_of_rate(iteration, iterations)
            optimizer.zero_grad()
            for start in range(0, len(rows), self.part):
                self._loss(layers, rows[start : start + self.part], weights).backward()
                layers.forget()
            layers.pass_gradients()
            add_gradients(trained, self.group)
            optimizer.step()
            layers.round()
            progress(iteration + 1)

    def _loss(self, layers: Layers, rows: Int64, weights: Float64) -> torch.Tensor:
        """Return the share of some samples in their batch's loss."""
        import torch

        outputs, targets = self.run(layers, rows), self.target(rows)
        of_sample = torch.stack([(a - b).square().flatten(1).sum(dim=1) for a, b in zip(outputs, targets, strict=True)])
        return (of_sample.sum(dim=0) * torch.from_numpy(weights[rows]).to(of_sample)).sum() / self.effort.batch


def own_parts(parts: Sequence[Part], group: ProcessGroup) -> Sequence[Part]:
    """Return the parts that this process works on."""
    return parts[group.rank :: group.size]


def add_gradients(parameters: Sequence[torch.Tensor], group: ProcessGroup) -> None:
    """Replace each gradient by the sum over all processes. Exactness: the same bits on every process."""
    import torch

    if group.size == 1:
        return
    parts = [torch.zeros_like(item) if item.grad is None else item.grad for item in parameters]
    total = torch.from_numpy(group.total(torch.cat([part.reshape(-1).cpu() for part in parts]).numpy()))
    for item, part in zip(parameters, total.split([item.numel() for item in parameters]), strict=True):
        item.grad = part.reshape(item.shape).to(item.device)


def share_of_rate(iteration: int, iterations: int) -> float:
    """Return the rate relative to its peak: a linear warm-up, then half a cosine down to LAST."""
    warm = max(1, round(WARM_UP * iterations))
    if iteration < warm:
        return (iteration + 1) / warm
    place = (iteration - warm) / max(1, iterations - warm)
    return LAST + (1 - LAST) * 0.5 * (1 + float(np.cos(np.pi * place)))


def _batches(rows: Int64, size: int, seed: tuple[int, ...]) -> Iterator[Int64]:
    """Yield batches of rows without end. All rows come in random order, again and again."""
    random = np.random.default_rng(seed)
    queue: Int64 = np.zeros(0, dtype=np.int64)
    while True:
        while len(queue) < size:
            queue = np.concatenate([queue, random.permutation(rows)])
        yield queue[:size]
        queue = queue[size:]


def squares(tensors: Sequence[torch.Tensor]) -> Float64:
    """Return the sum of squares of each sample over all tensors, float64[B]."""
    total: Float64 = sum(tensor.square().flatten(1).sum(dim=1) for tensor in tensors).cpu().numpy()  # type: ignore[union-attr]
    return total
