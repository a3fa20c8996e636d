"""Widths that differ from output channel to output channel inside one weight of 8-bit codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dq_export.core.grid import WeightGrid
from dq_export.core.qtypes import INT8
from dq_export.core.scheme import Scheme

from .rounding import Float32, Rounder

SHARES = (0.0, 0.1, 0.25)
"""Of the output channels, that get one bit more; as many get one bit less. MPQ-DM's code tries 0 and 0.1."""


def mixed(
    weight: Float32, scheme: Scheme, hessian: Float32 | None, mean: int, rounding: Rounder
) -> tuple[WeightGrid, Float32 | None]:
    """The grid of a weight and its codes in `mean` bits on average: channels of high kurtosis get one more, of low one less.

    Of SHARES the one with the least squared error is taken. Codes of few bits are 8-bit codes that use a part of their range.

    Args:
        hessian: as `rounding` takes it; it also weighs the errors that are compared.

    Source: MPQ-DM (arXiv 2412.11549), outlier-driven mixed quantization.
    """
    moments = np.ones(1, dtype=np.float32) if hessian is None else hessian
    order = np.argsort(_kurtosis(weight), kind="stable")
    best: tuple[float, Float32, Float32] | None = None
    rounded = {}
    for bits in (mean - 1, mean, mean + 1):  # each channel is rounded by itself, whatever the others' bits are
        grid, codes = rounding(weight, narrow(scheme, bits), hessian)
        rounded[bits] = grid.scale, grid.codes(weight) if codes is None else codes
    for count in dict.fromkeys(int(share * len(weight)) for share in SHARES):
        bits_of = np.full(len(weight), mean)
        bits_of[order[:count]] -= 1
        bits_of[order[len(order) - count :]] += 1
        scale = np.choose(bits_of - mean + 1, [part[0] for part in rounded.values()])
        codes = np.choose((bits_of - mean + 1)[:, None], [part[1] for part in rounded.values()])
        apart = codes * scale[:, None] - weight
        error = float((apart * (apart @ moments if moments.ndim > 1 else apart * moments)).sum(dtype=np.float64))
        if best is None or error < best[0]:
            best = error, scale, codes
    assert best is not None
    return WeightGrid(scale=best[1], qtype=INT8), best[2]


def _kurtosis(weight: Float32) -> npt.NDArray[np.float64]:
    """float64[out]: of each channel's weights; 0 where they are all equal."""
    apart = weight.astype(np.float64) - weight.mean(axis=1, keepdims=True)
    variance = np.square(apart).mean(axis=1)
    found: npt.NDArray[np.float64] = (apart**4).mean(axis=1) / np.where(variance > 0, variance, 1.0) ** 2
    return found


def narrow(scheme: Scheme, bits: int) -> Scheme:
    """The scheme with 8-bit codes that use `bits` of them."""
    assert scheme.weight is not None
    limit = 2 ** (bits - 1) - 1
    return replace(scheme, weight=replace(scheme.weight, qtype=replace(INT8, bits=bits, qmin=-limit, qmax=limit)))
