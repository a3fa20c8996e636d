"""The formulas of an in_scale, from the ranges of weights and activations in each channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
MIN_SCALE, MAX_SCALE = 1e-4, 1e4


def dilate(weight: Float32, activation_amax: Float32, rho: float) -> Float32:
    """float32[K]: s_k = d_k * clip(a_k / (d_k T), 1, rho), d_k = min_j amax_j / |W[j, k]|, T = max_k(a_k / d_k) / rho.

    d is weight dilation in symmetric form: the largest scaling of each input channel that does not change the range of any
    output channel; d_k >= 1, and 1 for a column of zeros. With rho > 1 the channels that still determine the
    activation's range are scaled down further, by at most rho, so that the range shrinks by rho while no row grows
    by more than rho. (The same rho for all channels would have no effect: x / rho and rho W cancel.)

    Exactness: with rho = 1 every row's amax is unchanged, to rounding.
    Source: DilateQuant (arXiv 2409.14307), section "Weight Dilation"; the masks replace its division by clamped
    weights, and rho is our relaxation.

    Args:
        weight: float32[out, K], the stacked weights of all readers of the tensor.
        activation_amax: float32[K], max |x| of each channel over all timesteps.
    """
    return dilated(room_of([weight]), activation_amax, rho)


def room_of(weights: Sequence[Float32]) -> Float32:
    """float32[K]: the minimum of amax_row / |W| over the rows of all W[out, K]; at most MAX_SCALE, and 1 for a column of
    zeros."""

    def largest_share(weight: Float32) -> Float32:
        """float32[K]: for each column, the greatest |element| relative to its row's range; 0 for rows of zeros."""
        magnitude = np.abs(weight)
        row_amax = magnitude.max(axis=1, keepdims=True)
        largest: Float32 = (magnitude / np.where(row_amax > 0, row_amax, 1.0)).max(axis=0)
        return largest

    share = np.maximum.reduce([largest_share(weight) for weight in weights])
    room: Float32 = np.where(share > 0, 1.0 / np.maximum(share, 1.0 / MAX_SCALE), 1.0).astype(np.float32)
    return room


def dilated(room: Float32, activation_amax: Float32, rho: float) -> Float32:
    """`dilate` of weights whose `room_of` is known."""
    reached = activation_amax / room
    target = reached.max() / rho
    further = np.clip(reached / target, 1.0, rho) if target > 0 else np.ones_like(reached)
    return (room * further).astype(np.float32)


def smooth(activation_amax: Float32, weight_amax: Float32, alpha: float) -> Float32:
    """float32[K]: s_k = a_k^alpha / w_k^(1 - alpha), clamped to 1e-4 … 1e4; 1 where a channel or a column is zero.

    Source: SmoothQuant (arXiv 2211.10438), equation 4. The clamp is ours: it keeps the folded rows far from the limits
    of float32.
    """
    usable = (activation_amax > 0) & (weight_amax > 0)
    a, w = np.where(usable, activation_amax, 1.0), np.where(usable, weight_amax, 1.0)
    return np.where(usable, np.clip(a**alpha / w ** (1 - alpha), MIN_SCALE, MAX_SCALE), 1.0).astype(np.float32)


def balance(amax: Float32, weight_amax: Float32) -> Float32:
    """float32[K]: s_k = sqrt(a_k / w_k) with a_k = sum_t eta_t amax[t, k], eta = softmax over t of -rho_t.

    rho_t is Spearman's rank correlation of the channels' activation and weight maxima at timestep t: steps at which large
    activations meet small weights have the largest weight. Clamped, and 1 for zero channels, like `smooth`.

    Source: PTQ4DiT (arXiv 2405.16005), channel-wise salience balancing with Spearman's rho-guided salience calibration.

    Args:
        amax: float32[T, K], max |x| of each channel at each timestep.
    """
    ranks = np.argsort(np.argsort(amax, axis=1), axis=1).astype(np.float64)
    weight_rank = np.argsort(np.argsort(weight_amax)).astype(np.float64)
    centred, other = ranks - ranks.mean(axis=1, keepdims=True), weight_rank - weight_rank.mean()
    length = np.linalg.norm(centred, axis=1) * np.linalg.norm(other)
    correlation = centred @ other / np.maximum(length, 1e-30)
    eta = np.exp(-correlation) / np.exp(-correlation).sum()
    return smooth((eta @ amax).astype(np.float32), weight_amax, 0.5)


def equalize(activation_range: Float32, weight_range: Float32) -> Float32:
    """float32[K]: s_k = sqrt(r_k / q_k), where r and q are the ranges (maximum - minimum) of channel and weight column.

    Source: AWEQ (arXiv 2311.01305), channel equalization; its bias correction is the recipe's `bias_correction`.
    """
    return smooth(activation_range, weight_range, 0.5)
