"""Equivalent scaling: the in_scale and in_shift of a site, by rule or by measured output error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .collect import SiteStatistics
from .qtypes import INT8
from .ranges import weight_scale
from .recipe import Recipe

Float32 = npt.NDArray[np.float32]
AUTO_ALPHA = (0.35, 0.5, 0.65, 0.8, 0.95)
AUTO_RHO = (1.0, 2.0, 4.0)
MIN_SCALE, MAX_SCALE = 1e-4, 1e4


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaling:
    """A candidate: x becomes (x - in_shift) / in_scale. `error` is its measured relative output error, NaN if unmeasured."""

    method: str
    in_scale: Float32
    in_shift: Float32
    error: float = float("nan")


def dilate(weight: Float32, activation_amax: Float32, rho: float) -> Float32:
    """float32[K]: s_k = d_k * clip(a_k / (d_k T), 1, rho), d_k = min_j amax_j / |W[j, k]|, T = max_k(a_k / d_k) / rho.

    d is weight dilation in symmetric form: the largest scaling of each input channel that leaves the range of every
    output channel as it is; d_k >= 1, and 1 for a column of zeros. With rho > 1 the channels that still set the
    activation's range are scaled down further, by rho at the most, so that the range shrinks by rho while no row grows
    by more than rho. (The same rho for all channels would do nothing: x / rho and rho W cancel.)

    Exactness: with rho = 1 every row's amax is unchanged.
    Source: DilateQuant (arXiv 2409.14307), section "Weight Dilation"; the masks replace its division by clamped
    weights, and rho is our relaxation.

    Args:
        weight: float32[out, K], the stacked weights of all readers of the tensor.
        activation_amax: float32[K], max |x| of each channel over all timesteps.
    """
    amax = np.abs(weight).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # zeros, rows of zeros and subnormal weights
        room = np.where(weight != 0, amax / np.abs(weight), np.inf)
    least = room.min(axis=0)
    dilation = np.where(np.isfinite(least), np.minimum(least, MAX_SCALE), 1.0)
    reached = activation_amax / dilation
    target = reached.max() / rho
    further = np.clip(reached / target, 1.0, rho) if target > 0 else np.ones_like(reached)
    in_scale: Float32 = (dilation * further).astype(np.float32)
    return in_scale


def smooth(activation_amax: Float32, weight_amax: Float32, alpha: float) -> Float32:
    """float32[K]: s_k = a_k^alpha / w_k^(1 - alpha), clamped to 1e-4 … 1e4; 1 where a channel or a column is zero.

    Source: SmoothQuant (arXiv 2211.10438), equation 4. The clamp is ours: it keeps the folded rows far from the limits
    of float32.
    """
    usable = (activation_amax > 0) & (weight_amax > 0)
    a, w = np.where(usable, activation_amax, 1.0), np.where(usable, weight_amax, 1.0)
    return np.where(usable, np.clip(a**alpha / w ** (1 - alpha), MIN_SCALE, MAX_SCALE), 1.0).astype(np.float32)


def choose_scaling(statistics: SiteStatistics, weight: Float32, recipe: Recipe, *, quantized: npt.NDArray[np.bool_]) -> Scaling:
    """The recipe's scaling of one site; for `auto` the candidate with the least output error on the kept rows.

    All readers of the tensor are judged together. `auto` first picks the rule and its strength, then whether to shift by
    the middle of each channel's range or by its mean. Ties go to the earlier candidate, so that nothing is scaled for
    nothing.

    Args:
        weight: float32[out, K], stacked weights of all readers.
        quantized: bool[out], the rows that will be quantized.
    """
    read = weight[quantized]
    middle = ((statistics.low.min(axis=0) + statistics.high.max(axis=0)) / 2).astype(np.float32)
    unshifted = ("", np.zeros_like(middle))
    shifts = [("+shift", middle)]
    if recipe.scaling == "auto":
        shifts.append(("+mean", statistics.mean.mean(axis=0)))
    rules = {
        "none": [("none", 0.0)],
        "dilate": [("dilate", recipe.rho)],
        "smooth": [("smooth", recipe.alpha)],
        "auto": [("none", 0.0), *(("dilate", rho) for rho in AUTO_RHO), *(("smooth", alpha) for alpha in AUTO_ALPHA)],
    }[recipe.scaling]
    first = shifts[0] if recipe.shift else unshifted

    def measured(rule: tuple[str, float], shift: tuple[str, Float32]) -> Scaling:
        return _measure(_candidate(rule, shift, statistics, read), statistics, read)

    best_rule, best = min(((rule, measured(rule, first)) for rule in rules), key=lambda pair: pair[1].error)
    if recipe.scaling == "auto" and recipe.shift is not False:
        others = [measured(best_rule, shift) for shift in shifts if shift is not first]
        best = min([best, *others], key=lambda item: item.error)
    return best


def _candidate(rule: tuple[str, float], shift: tuple[str, Float32], statistics: SiteStatistics, weight: Float32) -> Scaling:
    (name, strength), (suffix, in_shift) = rule, shift
    amax = np.maximum(np.abs(statistics.high - in_shift), np.abs(statistics.low - in_shift)).max(axis=0)
    if name == "dilate":
        in_scale = dilate(weight, amax, strength)
    elif name == "smooth":
        in_scale = smooth(amax, np.abs(weight).max(axis=0), strength)
    else:
        in_scale = np.ones(weight.shape[1], dtype=np.float32)
    label = name if name == "none" else f"{name}({strength:g})"
    return Scaling(method=label + suffix, in_scale=in_scale, in_shift=in_shift.astype(np.float32))


def _measure(candidate: Scaling, statistics: SiteStatistics, weight: Float32) -> Scaling:
    """The candidate with its relative output error: |W x - Q(W) Q(x)|^2 / |W x|^2 over the kept rows, W8A8 per timestep.
    Infinite where the shift takes away a constant input entirely, so that nothing is left to have a scale."""
    in_scale, in_shift = candidate.in_scale, candidate.in_shift
    scale = statistics.amax(in_scale, in_shift) / INT8.qmax
    if not scale.any():
        return Scaling(method=candidate.method, in_scale=in_scale, in_shift=in_shift, error=float("inf"))
    scale = np.where(scale > 0, scale, 1.0)[statistics.row_step][:, None]
    scaled = (statistics.rows - in_shift) / in_scale
    activation = np.clip(np.rint(scaled / scale), INT8.qmin, INT8.qmax) * scale
    folded = weight * in_scale
    step = weight_scale(folded)[:, None]
    rounded = np.clip(np.rint(folded / step), INT8.qmin, INT8.qmax) * step
    # The shift's own output, W m, is added exactly (it is folded into the bias).
    exact = scaled @ folded.T
    error = exact - activation @ rounded.T
    signal = statistics.rows @ weight.T
    relative = float(np.square(error, dtype=np.float64).sum() / max(np.square(signal, dtype=np.float64).sum(), 1e-30))
    return Scaling(method=candidate.method, in_scale=in_scale, in_shift=in_shift, error=relative)
