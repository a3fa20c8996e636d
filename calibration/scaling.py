"""Equivalent scaling: the in_scale and in_shift of a site, by rule or by measured output error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .collect import SiteStatistics
from .qtypes import INT8, QuantType
from .ranges import weight_scale
from .recipe import Recipe

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
AUTO_ALPHA = (0.35, 0.5, 0.65, 0.8, 0.95)
AUTO_RHO = (1.0, 2.0, 4.0)
MIN_SCALE, MAX_SCALE = 1e-4, 1e4
OUTPUTS = 256
"""Outputs of a site that a candidate is measured on."""
EXACT_TERMS = 2**24 // INT8.qmax**2 // 16 * 16
"""Products of two codes whose sum float32 holds exactly."""


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

    Exactness: with rho = 1 every row's amax is unchanged, to rounding.
    Source: DilateQuant (arXiv 2409.14307), section "Weight Dilation"; the masks replace its division by clamped
    weights, and rho is our relaxation.

    Args:
        weight: float32[out, K], the stacked weights of all readers of the tensor.
        activation_amax: float32[K], max |x| of each channel over all timesteps.
    """
    return _dilated(_room(np.abs(weight)), activation_amax, rho)


def _product(rows: Float32, weight: Float32) -> Float64:
    """rows @ weight.T, summed in float64: in any order equal to more digits than are kept."""
    product: Float64 = rows.astype(np.float64) @ weight.T.astype(np.float64)
    return product


def _code_product(left: Float32, right: Float32) -> Float64:
    """left @ right.T of codes of 8 bits held as float32. Exact: sums of 1024 products stay below 2^24, and those are summed in
    float64."""
    product = np.zeros((len(left), len(right)))
    for start in range(0, left.shape[1], EXACT_TERMS):
        part = slice(start, start + EXACT_TERMS)
        product += left[:, part] @ right[:, part].T
    return product


def _room(magnitude: Float32) -> Float32:
    """float32[K]: min over rows of amax_row / |W|, from |W|[out, K]; at most MAX_SCALE, and 1 for a column of zeros."""
    row_amax = magnitude.max(axis=1, keepdims=True)
    # The greatest share of its row's range that an element takes; rows of zeros take none.
    share = (magnitude / np.where(row_amax > 0, row_amax, 1.0)).max(axis=0)
    room: Float32 = np.where(share > 0, 1.0 / np.maximum(share, 1.0 / MAX_SCALE), 1.0).astype(np.float32)
    return room


def _dilated(room: Float32, activation_amax: Float32, rho: float) -> Float32:
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


def choose_scaling(
    statistics: SiteStatistics, weight: Float32, recipe: Recipe, *, quantized: npt.NDArray[np.bool_], qtype: QuantType = INT8
) -> Scaling:
    """The recipe's scaling of one site; for `auto` the candidate with the least output error on the kept rows.

    All readers of the tensor are judged together, by up to 256 of their outputs, evenly spaced: each output's error is
    exact, and so many are enough to rank candidates. `auto` first picks the rule and its strength, then whether to shift
    by the middle of each channel's range or by its mean. Ties go to the earlier candidate, so that nothing is scaled for
    nothing.

    Args:
        weight: float32[out, K], stacked weights of all readers.
        quantized: bool[out], the rows that will be quantized.
        qtype: element type of their weights and of the activation.
    """
    trial = _Trial.of(statistics, weight if quantized.all() else weight[quantized], qtype)
    middle = ((statistics.low.min(axis=0) + statistics.high.max(axis=0)) / 2).astype(np.float32)
    unshifted = ("", np.zeros_like(middle))
    shifts = [("+shift", middle)]
    if recipe.scaling == "auto":
        shifts.append(("+mean", statistics.rows.mean(axis=0)))
    rules = {
        "none": [("none", 0.0)],
        "dilate": [("dilate", recipe.rho)],
        "smooth": [("smooth", recipe.alpha)],
        "auto": [("none", 0.0), *(("dilate", rho) for rho in AUTO_RHO), *(("smooth", alpha) for alpha in AUTO_ALPHA)],
    }[recipe.scaling]
    first = shifts[0] if recipe.shift else unshifted
    best_rule, best = min(((rule, trial.measure(rule, first)) for rule in rules), key=lambda pair: pair[1].error)
    if recipe.scaling == "auto" and recipe.shift is not False:
        others = [trial.measure(best_rule, shift) for shift in shifts if shift is not first]
        best = min([best, *others], key=lambda item: item.error)
    return best


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trial:
    """What the candidates of one site are measured on.

    Args:
        room: float32[K], how far each column can grow within its rows' ranges (weight dilation's d).
        column_amax: float32[K], max |W| of each column.
        weight: float32[at most 256, K], the outputs that are computed.
        exact: float64[rows, outputs], W x of the kept rows.
    """

    statistics: SiteStatistics
    room: Float32
    column_amax: Float32
    weight: Float32
    exact: Float64
    qtype: QuantType

    @staticmethod
    def of(statistics: SiteStatistics, weight: Float32, qtype: QuantType) -> _Trial:
        """For the stacked weights float32[out, K] of all quantized readers."""
        magnitude = np.abs(weight)
        chosen = np.linspace(0, len(weight) - 1, min(len(weight), OUTPUTS)).round().astype(np.int64)
        few = weight[chosen]
        return _Trial(
            statistics=statistics,
            room=_room(magnitude),
            column_amax=magnitude.max(axis=0),
            weight=few,
            exact=_product(statistics.rows, few),
            qtype=qtype,
        )

    def measure(self, rule: tuple[str, float], shift: tuple[str, Float32]) -> Scaling:
        """A candidate with its relative output error: |W x - Q(W) Q(x)|^2 / |W x|^2 over the kept rows, W8A8 per timestep.

        The shift's own output, W m, is added exactly: it is folded into the bias. Infinite where the shift takes away a
        constant input entirely, so that nothing is left to have a scale.
        """
        (name, strength), (suffix, shifted_by) = rule, shift
        label = (name if name == "none" else f"{name}({strength:g})") + suffix
        in_shift, in_scale = shifted_by.astype(np.float32), self._in_scale(name, strength, shifted_by)
        limit = self.statistics.amax(in_scale, in_shift) / self.qtype.qmax
        if not limit.any():
            return Scaling(method=label, in_scale=in_scale, in_shift=in_shift, error=float("inf"))
        scale = np.where(limit > 0, limit, 1.0)[self.statistics.row_step][:, None].astype(np.float32)
        moved = self.statistics.rows - in_shift
        codes = self.qtype.round(moved / (in_scale * scale))
        folded = self.weight * in_scale
        step = weight_scale(folded, self.qtype)[:, None]
        rounded = self.qtype.round(folded / step)
        product = _product(codes, rounded) if self.qtype.mantissa else _code_product(codes, rounded)
        error = self.exact - _product(in_shift[None], self.weight) - product * (scale * step.T)
        relative = float(np.square(error).sum() / max(np.square(self.exact).sum(), 1e-30))
        # Six digits: the order of the sums above, which threads change, is far below them.
        return Scaling(method=label, in_scale=in_scale, in_shift=in_shift, error=float(f"{relative:.6g}"))

    def _in_scale(self, name: str, strength: float, in_shift: Float32) -> Float32:
        high, low = self.statistics.high, self.statistics.low
        amax = np.maximum(np.abs(high.max(axis=0) - in_shift), np.abs(low.min(axis=0) - in_shift))
        if name == "dilate":
            return _dilated(self.room, amax, strength)
        if name == "smooth":
            return smooth(amax, self.column_amax, strength)
        return np.ones(len(amax), dtype=np.float32)
