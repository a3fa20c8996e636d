"""How alike two sets of pictures are, by their pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .compare import decibels

Float32 = npt.NDArray[np.float32]
RANGE = 2.0
"""From the least to the greatest value of a pixel: -1 to 1."""
WINDOW, SIGMA = 11, 1.5
"""Pixels, and standard deviation, of SSIM's window."""
STABILITY = (0.01, 0.03)
"""SSIM's K1 and K2."""


def psnr(references: Float32, pictures: Float32) -> float:
    """Peak signal to noise in dB, mean over the pictures; 200 of equal ones, -200 of ones with NaN or infinity.

    Args:
        references, pictures: float32[N, C, H, W] in [-1, 1].
    """
    errors = np.square(references.astype(np.float64) - pictures).mean(axis=(1, 2, 3))
    return float(decibels(np.full(len(errors), RANGE**2), errors).mean())


def ssim(references: Float32, pictures: Float32) -> float | None:
    """Structural similarity, mean over pictures, channels and pixels; None where a picture is too small for the window.

    Args:
        references, pictures: float32[N, C, H, W] in [-1, 1], finite.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004;
    torchmetrics' `structural_similarity_index_measure` gives the same numbers.
    """
    if min(references.shape[2:]) <= WINDOW // 2:
        return None
    return float(np.mean([_ssim(*pair) for pair in zip(references, pictures, strict=True)]))


def _ssim(reference: Float32, picture: Float32) -> float:
    x, y = reference.astype(np.float64), picture.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variances = _blurred(x * x) - mean_x**2 + _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    first, second = ((factor * RANGE) ** 2 for factor in STABILITY)
    above = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    return float((above / ((mean_x**2 + mean_y**2 + first) * (variances + second))).mean())


def _blurred(picture: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means around each pixel, weighted by a Gaussian: rows first, then columns. Pictures are mirrored at their borders."""
    weights = np.exp(-0.5 * np.square((np.arange(WINDOW) - WINDOW // 2) / SIGMA))
    weights /= weights.sum()
    around = WINDOW // 2
    mirrored = np.pad(picture, ((0, 0), (around, around), (around, around)), mode="reflect")
    rows = np.lib.stride_tricks.sliding_window_view(mirrored, WINDOW, axis=2) @ weights
    result: npt.NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(rows, WINDOW, axis=1) @ weights
    return result
