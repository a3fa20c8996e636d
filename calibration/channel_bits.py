"""Rounds the output channels of a weight to different numbers of bits, all stored as 8-bit codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dq_export.core.grid import WeightGrid
from dq_export.core.qtypes import INT8
from dq_export.core.scheme import Scheme

from .rounding import Float32, Rounder

SHARES = (0.0, 0.1, 0.25)
"""Shares of the output channels that get one bit more; as many get one bit less. MPQ-DM's code tries 0 and 0.1."""


def mixed(
    weight: Float32, scheme: Scheme, hessian: Float32 | None, mean: int, rounding: Rounder
) -> tuple[WeightGrid, Float32 | None]:
    """Return the grid and the codes of a weight with `mean` bits on average.

    Channels of high kurtosis get one bit more, as many channels of low kurtosis one bit less. The share is the one of SHARES
    with the smallest squared error. Codes of fewer bits are 8-bit codes that use a part of their range.

    Args:
    hessian: the argument of `rounding`; it also weighs the squared errors.

    Source: MPQ-DM (arXiv 2412.11549), outlier-driven mixed quantization.
    """
    moments = np.ones(1, dtype=np.float32) if hessian is None else hessian
    order = np.argsort(_kurtosis(weight), kind="stable")
    best: tuple[float, Float32, Float32] | None = None
    rounded = {}
    for bits in (mean - 1, mean, mean + 1):  # a channel's codes do not depend on the bits of other channels
        grid, codes = rounding(weight, narrow(scheme, bits), hessian)
        rounded[bits] = grid.scale, grid.codes(weight) if codes is None else codes
    for count in dict.fromkeys(int(share * len(weight)) for share in SHARES):
        bits_of = np.full(len(weight), mean)
        bits_of[order[:count]] -= 1
        bits_of[order[len(order) - count :]] += 1
        scale = np.choose(bits_of - mean + 1, [part[0] for part in rounded.values()])
        codes = np.choose((bits_of - mean + 1)[:, None], [part[1] for part in rounded.values()])
        errors = codes * scale[:, None] - weight
        error = float((errors * (errors @ moments if moments.ndim > 1 else errors * moments)).sum(dtype=np.float64))
        if best is None or error < best[0]:
            best = error, scale, codes
    assert best is not None
    return WeightGrid(scale=best[1], qtype=INT8), best[2]


def _kurtosis(weight: Float32) -> npt.NDArray[np.float64]:
    """Return the kurtosis of each channel's weights, float64[out]; 0 if they are all equal."""
    deviation = weight.astype(np.float64) - weight.mean(axis=1, keepdims=True)
    variance = np.square(deviation).mean(axis=1)
    kurtosis: npt.NDArray[np.float64] = (deviation**4).mean(axis=1) / np.where(variance > 0, variance, 1.0) ** 2
    return kurtosis


def narrow(scheme: Scheme, bits: int) -> Scheme:
    """Return the scheme with 8-bit codes that use the range of `bits` bits."""
    assert scheme.weight is not None
    limit = 2 ** (bits - 1) - 1
    return replace(scheme, weight=replace(scheme.weight, qtype=replace(INT8, bits=bits, qmin=-limit, qmax=limit)))
