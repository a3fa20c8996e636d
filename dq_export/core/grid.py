"""The grid of a weight: the real numbers that its codes represent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .qtypes import INT8, QuantType
from .scheme import Scheme

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
RATIOS = np.linspace(0.5, 1.0, 26, dtype=np.float32)
"""Shares of amax that `fit` tries."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightGrid:
    """The steps of a weight[out, K], whose elements are `code * step`.

    There are three forms: a scale for each output channel; a scale for each block along the input; two levels, where a
    block's step is a whole multiple of its channel's scale, so that `code * multiplier` is an 8-bit code of one integer GEMM.

    Args:
        scale: float32[out], or float32[K / block, out], > 0.
        multiplier: int8[K / block, out], 1 … 127 // qmax, or None with one level.
        qtype: of the codes.
    """

    scale: Float32
    qtype: QuantType
    multiplier: Int8 | None = None

    @property
    def blocks(self) -> int:
        """Blocks along the input; 1 for a scale for each output channel."""
        if self.multiplier is not None:
            return len(self.multiplier)
        return len(self.scale) if self.scale.ndim == 2 else 1

    def fits(self, outputs: int, width: int) -> bool:
        """Whether it is a grid of weights [outputs, width]."""
        return self.scale.shape[-1] == outputs and width % self.blocks == 0

    def steps(self, width: int) -> Float32:
        """float32[out, width], broadcast where possible: the step of every element."""
        if self.multiplier is not None:
            blocks = self.multiplier.T.astype(np.float32) * self.scale[:, None]
        elif self.scale.ndim == 2:
            blocks = self.scale.T
        else:
            return self.scale[:, None]
        return np.repeat(blocks, width // blocks.shape[1], axis=1)

    def of_rows(self, rows: npt.NDArray[np.int64]) -> WeightGrid:
        """The grid of some output channels."""
        multiplier = None if self.multiplier is None else self.multiplier[:, rows]
        return WeightGrid(scale=self.scale[..., rows], qtype=self.qtype, multiplier=multiplier)

    def codes(self, weight: Float32) -> Float32:
        """float32[out, K]: the nearest codes."""
        return self.qtype.round((weight / self.steps(weight.shape[1])).astype(np.float32, copy=False))

    def nearest(self, weight: Float32) -> Float32:
        """float32[out, K]: the nearest real numbers of the grid."""
        return self.codes(weight) * self.steps(weight.shape[1])


def cover(weight: Float32, scheme: Scheme) -> WeightGrid:
    """The finest grid of the scheme that clips nothing: amax / qmax of each channel or block; a zero one gets 1.

    Raises:
        ValueError: the scheme's blocks do not divide the width.
    """
    qtype, block = _form(weight, scheme)
    return _grid((_amax(weight, block) / qtype.qmax).astype(np.float32), qtype, block, two_level=scheme.two_level, up=True)


def fit(weight: Float32, scheme: Scheme, importance: Float32 | None) -> WeightGrid:
    """The grid of least squared error: each channel's or block's amax times the best of RATIOS.

    Args:
        importance: float32[K], the mean square of each input, which weights its column's errors; None for equal weights.

    Raises:
        ValueError: the scheme's blocks do not divide the width.
    """
    qtype, block = _form(weight, scheme)
    amax = _amax(weight, block)
    size = weight.shape[1] // amax.shape[0]
    counts = np.ones(weight.shape[1], dtype=np.float32) if importance is None else importance
    best: npt.NDArray[np.floating] = amax / qtype.qmax
    lowest = np.full(amax.shape, np.inf)
    for ratio in RATIOS[::-1]:
        candidate = ratio * amax / qtype.qmax
        # For two levels this is each block's own step; the multiplier is fitted to it below.
        steps = np.repeat(np.where(candidate > 0, candidate, 1.0).T, size, axis=1)
        error = np.square(qtype.round((weight / steps).astype(np.float32)) * steps - weight) * counts
        errors = error.reshape(len(weight), -1, size).sum(axis=2).T
        better = errors < lowest
        best, lowest = np.where(better, candidate, best), np.where(better, errors, lowest)
    return _grid(best.astype(np.float32), qtype, block, two_level=scheme.two_level, up=False)


def _form(weight: Float32, scheme: Scheme) -> tuple[QuantType, int]:
    assert scheme.weight is not None
    return scheme.weight.qtype, scheme.block_size(weight.shape[1])


def _amax(weight: Float32, block: int) -> Float32:
    """float32[blocks, out]; one block if there is a scale for each output channel."""
    blocks: Float32 = np.abs(weight).reshape(len(weight), -1, block or weight.shape[1]).max(axis=2).T
    return blocks


def _grid(steps: Float32, qtype: QuantType, block: int, *, two_level: bool, up: bool) -> WeightGrid:
    positive = np.where(steps > 0, steps, 1.0).astype(np.float32)
    if not block:
        return WeightGrid(scale=positive[0], qtype=qtype)
    if not two_level:
        return WeightGrid(scale=positive, qtype=qtype)
    multiplier_limit = INT8.qmax // qtype.qmax
    largest = steps.max(axis=0) / multiplier_limit
    scale = np.where(largest > 0, largest, 1.0).astype(np.float32)
    ratio = steps / scale
    # A thousandth: what float32 rounding adds to a ratio that is whole.
    whole = np.ceil(ratio - 1e-3) if up else np.rint(ratio)
    return WeightGrid(scale=scale, qtype=qtype, multiplier=np.clip(whole, 1, multiplier_limit).astype(np.int8))
