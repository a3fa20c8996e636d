"""Equivalent scaling: the in_scale and in_shift of a site, chosen by rule or by measured output error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dq_export.core.grid import WeightGrid, cover
from dq_export.core.qtypes import INT8
from dq_export.core.recipe import Recipe
from dq_export.core.scales import TokenScale
from dq_export.core.scheme import Scheme

from .collect.statistics import SiteStatistics
from .in_scale import balance, dilated, equalize, room_of, smooth

T = TypeVar("T")
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
AUTO_ALPHA = (0.35, 0.5, 0.65, 0.8, 0.95)
AUTO_RHO = (1.0, 2.0, 4.0)
AUTO_CLIP = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of amax that `auto` tries below CLIPPED_BELOW bits."""
CLIPPED_BELOW = 6
"""With 6 and 8 bits, clipping improved calls but made pictures worse: by 2 to 7 dB with 6 bits, on four networks of digits."""
COHERENT = 16
"""Weight of the error of clipping when `auto` compares shares of amax. It has the same sign at one timestep after the other and
adds up along a trajectory, where rounding errors cancel. Pictures of the four networks with w4a4 gain 2 to 9 dB over a weight of
0; with 8 one network gains 0.8 dB more and two others 1.5 dB less."""
SMALLEST_HALF = 2.0**-17
"""Of scales that `auto` considers for a graph in float16, whose numbers lie 2^-24 apart there: rounding moves such a scale by
0.4 % at most, which is half a code of 8 bits."""
WORTHWHILE = 10 ** (-1 / 10)
"""Share of the error that may be left, 1 dB less, where `auto` leaves a Mul or an Add on all tokens before 8-bit codes. An Add
behind GELU in each block takes 1.5 % of the operators' time of PixArt on ONNX Runtime."""
OUTPUTS = 256
"""Number of outputs of a site on which a candidate is measured."""
EXACT_TERMS = 2**24 // INT8.qmax**2 // 16 * 16
"""Number of products of two codes whose sum float32 represents exactly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaling:
    """A candidate: x becomes (x - in_shift) / in_scale, and the codes cover the share `clip` of its range.

    Args:
        error: the measured relative output error; NaN if unmeasured.
        alternatives: the errors of all measured candidates, by method; empty if there was no choice.
    """

    method: str
    in_scale: Float32
    in_shift: Float32
    clip: float = 1.0
    error: float = float("nan")
    alternatives: Mapping[str, float] = field(default_factory=dict)


def _product(rows: Float32, weight: Float32) -> Float64:
    """rows @ weight.T, summed in float64: the order of summation does not affect the digits that are kept."""
    product: Float64 = rows.astype(np.float64) @ weight.T.astype(np.float64)
    return product


def _code_product(left: Float32, right: Float32) -> Float64:
    """left @ right.T of 8-bit codes stored as float32. Exact: sums of 1024 products stay below 2^24, and these sums are added
    in float64."""
    product = np.zeros((len(left), len(right)))
    for start in range(0, left.shape[1], EXACT_TERMS):
        part = slice(start, start + EXACT_TERMS)
        product += left[:, part] @ right[:, part].T
    return product


def _evenly(weights: Sequence[Float32], limit: int) -> Float32:
    """float32[at most `limit`, K]: rows of all weights, evenly spaced as if the weights were stacked."""
    total = sum(map(len, weights))
    chosen = np.linspace(0, total - 1, min(total, limit)).round().astype(np.int64)
    rows: list[Float32] = []
    start = 0
    for weight in weights:
        rows.append(weight[chosen[(chosen >= start) & (chosen < start + len(weight))] - start])
        start += len(weight)
    return np.concatenate(rows)


def choose_scaling(
    statistics: SiteStatistics, weights: Sequence[Float32], recipe: Recipe, *, scheme: Scheme, free: bool = True, taps: int = 1
) -> Scaling:
    """The recipe's scaling of one site; for `auto` the candidate with the least output error on the kept rows.

    All readers of the tensor are judged together, by up to 256 of their outputs, evenly spaced: each output's error is
    exact, and so many are enough to rank candidates. `auto` first picks the rule and its strength, then whether to shift
    by the middle of each channel's range or by its mean, then below 6 bits how much of the range to clip. Ties go to the
    earlier candidate, so that nothing is scaled for nothing. Where scaling is not free, activations of 8 bits take the candidate
    that costs less time unless the other gains 1 dB; below 8 bits every gain counts.

    Args:
        weights: float32[out, K] of each reader that will be quantized. They are not stacked, because every block reads a
            text.
        scheme: how weights and activation are quantized.
        free: whether scale and shift cost nothing, or next to nothing; else each is an operation on all tokens.
        taps: the number of neighbouring columns that are one channel, and have one scale: a patch's of a convolution.
    """
    smallest = SMALLEST_HALF if recipe.dtype == "fp16" else 0.0
    trial = _Trial.of(statistics, weights, scheme, smallest, taps)
    middle = ((statistics.low.min(axis=0) + statistics.high.max(axis=0)) / 2).astype(np.float32)
    unshifted = ("", np.zeros_like(middle))
    shifts = [("+shift", middle)]
    if recipe.scaling == "auto":
        shifts.append(("+mean", statistics.rows.mean(axis=0)))
    rules = {
        "none": [("none", 0.0)],
        "dilate": [("dilate", recipe.rho)],
        "smooth": [("smooth", recipe.alpha)],
        "balance": [("balance", 0.0)],
        "equalize": [("equalize", 0.0)],
        "auto": [
            ("none", 0.0), *(("dilate", rho) for rho in AUTO_RHO), *(("smooth", alpha) for alpha in AUTO_ALPHA),
            ("balance", 0.0), ("equalize", 0.0),
        ],
    }[recipe.scaling]  # fmt: skip
    first = shifts[0] if recipe.shift else unshifted
    bits = 16 if scheme.graph_type is None else scheme.graph_type.bits
    share = 1.0 if free or bits < 8 else WORTHWHILE
    candidates = [(rule, trial.measure(rule, first)) for rule in rules]
    best_rule, best = _worthwhile(candidates, share)
    shift, measured = first, [scaling for _, scaling in candidates]
    if recipe.scaling == "auto" and recipe.shift is not False and scheme.activation is not None:
        tried = [(first, best), *((other, trial.measure(best_rule, other)) for other in shifts if other is not first)]
        shift, best = _worthwhile(tried, 1.0 if recipe.shift else share)
        measured += [scaling for _, scaling in tried[1:]]
    if recipe.scaling == "auto" and recipe.method == "minmax" and bits < CLIPPED_BELOW:
        clipped = [trial.measure(best_rule, shift, clip) for clip in AUTO_CLIP]
        best = min([best, *clipped], key=lambda item: item.error + COHERENT * trial.clipping(item))
        measured += clipped
    if recipe.scaling != "auto":
        return best
    return replace(best, alternatives={item.method: item.error for item in measured if np.isfinite(item.error)})


def by_channel(extreme: np.ufunc, values: Float32, taps: int) -> Float32:
    """float32[K]: each value replaced by the extreme of the `taps` neighbours that are one channel."""
    of_channel: Float32 = extreme.reduce(values.reshape(-1, taps), axis=1)
    return of_channel.repeat(taps)


def _worthwhile(candidates: Sequence[tuple[T, Scaling]], share: float) -> tuple[T, Scaling]:
    """The candidate with the least error; the first, which costs least, unless that leaves at most `share` of its error."""
    best = min(candidates, key=lambda pair: pair[1].error)
    return best if best[1].error <= share * candidates[0][1].error else candidates[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trial:
    """The data on which the candidates of one site are measured.

    Args:
        room: float32[K], the factor by which each column can grow within its rows' ranges (weight dilation's d).
        column_amax, column_range: float32[K], max |W| of each column, and max W - min W.
        weight: float32[at most 256, K], the outputs that are computed.
        exact: float64[rows, outputs], W x of the kept rows.
        smallest: the smallest scale of an input or a weight that the graph's float type represents well.
    """

    statistics: SiteStatistics
    room: Float32
    column_amax: Float32
    column_range: Float32
    weight: Float32
    exact: Float64
    scheme: Scheme
    smallest: float

    @staticmethod
    def of(statistics: SiteStatistics, weights: Sequence[Float32], scheme: Scheme, smallest: float, taps: int) -> _Trial:
        """A trial for the weights float32[out, K] of all quantized readers. `taps` neighbouring columns are one channel."""
        high = by_channel(np.maximum, np.maximum.reduce([weight.max(axis=0) for weight in weights]), taps)
        low = by_channel(np.minimum, np.minimum.reduce([weight.min(axis=0) for weight in weights]), taps)
        sample = _evenly(weights, OUTPUTS)
        return _Trial(
            statistics=statistics,
            room=by_channel(np.minimum, room_of(weights), taps),
            column_amax=np.maximum(high, -low),
            column_range=high - low,
            weight=sample,
            exact=_product(statistics.rows, sample),
            scheme=scheme,
            smallest=smallest,
        )

    def measure(self, rule: tuple[str, float], shift: tuple[str, Float32], clip: float = 1.0) -> Scaling:
        """A candidate with its relative output error: |W x - Q(W) Q(x)|^2 / |W x|^2 over the kept rows, quantized as the
        site's scheme says, weights to nearest.

        The output of the shift itself, W m, is added exactly, because it is folded into the bias. The error is infinite if the
        shift removes a constant input entirely, so that no range is left for a scale, or if a scale is below `smallest`.
        """
        (name, strength), (suffix, shifted_by) = rule, shift
        label = (f"{name}({strength:g})" if strength else name) + suffix + (f"*{clip:g}" if clip < 1 else "")
        in_shift, in_scale = shifted_by.astype(np.float32), self._in_scale(name, strength, shifted_by)
        limit = self.statistics.amax(in_scale, in_shift) * np.float32(clip)
        folded = self.weight * in_scale
        grid = cover(folded, self.scheme)
        candidate = {"method": label, "in_scale": in_scale, "in_shift": in_shift, "clip": clip}
        if not limit.any() or self._underflows(limit, grid):
            return Scaling(**candidate, error=float("inf"))  # type: ignore[arg-type]
        moved = ((self.statistics.rows - in_shift) / in_scale).astype(np.float32)
        product = self._product(moved, folded, grid, limit, clip)
        error = self.exact - _product(in_shift[None], self.weight) - product
        return Scaling(**candidate, error=self._relative(error))  # type: ignore[arg-type]

    def _relative(self, error: Float64) -> float:
        """The power of an output error relative to the output's. Six digits: the order of sums, which depends on threads, affects
        only later digits."""
        relative = float(np.square(error).sum() / max(np.square(self.exact).sum(), 1e-30))
        return float(f"{relative:.6g}")

    def clipping(self, scaling: Scaling) -> float:
        """The relative output error of what a candidate clips, |W (x - clipped x)|^2 / |W x|^2 over the kept rows."""
        if scaling.clip == 1 or not np.isfinite(scaling.error):
            return 0.0
        moved = (self.statistics.rows - scaling.in_shift) / scaling.in_scale
        if self.scheme.per_token:
            limit = np.abs(moved).max(axis=1)
        else:
            limit = self.statistics.amax(scaling.in_scale, scaling.in_shift)[self.statistics.row_step]
        bound = scaling.clip * limit[:, None]
        excess = (moved - np.clip(moved, -bound, bound)).astype(np.float32)
        return self._relative(_product(excess, self.weight * scaling.in_scale))

    def _underflows(self, amax: Float32, grid: WeightGrid) -> bool:
        """Whether a scale is below `smallest`. `amax`: of the input at each timestep; a timestep of zeros has no scale."""
        qtype = self.scheme.graph_type
        lowest = float(grid.scale.min())
        if qtype is not None:
            lowest = min(lowest, float(amax[amax > 0].min()) / qtype.qmax)
        return lowest < self.smallest

    def _product(self, moved: Float32, folded: Float32, grid: WeightGrid, amax: Float32, clip: float) -> Float64:
        """Q(W) Q(x), float64[rows, outputs]. `grid`: of the folded weight; `amax`: of the input at each timestep."""
        scheme = self.scheme.fitted(folded.shape[1])
        activation, qtype = scheme.activation, scheme.graph_type
        if activation is None:
            return _product(moved, grid.nearest(folded))
        if qtype is None:
            return _product(TokenScale(constant=1.0, group=activation.size or 0).nearest(moved), grid.nearest(folded))
        if scheme.per_token:
            return _product(TokenScale(constant=1.0, clip=clip, qtype=qtype).nearest(moved), grid.nearest(folded))
        limit = amax / qtype.qmax
        scale = np.where(limit > 0, limit, 1.0)[self.statistics.row_step][:, None].astype(np.float32)
        codes = qtype.round(moved / scale)
        if qtype.is_float or grid.scale.ndim > 1 or grid.multiplier is not None:
            scaled: Float64 = _product(codes, grid.nearest(folded)) * scale
            return scaled
        exact: Float64 = _code_product(codes, grid.codes(folded)) * (scale * grid.steps(folded.shape[1]).T)
        return exact

    def _in_scale(self, name: str, strength: float, in_shift: Float32) -> Float32:
        high, low = self.statistics.high, self.statistics.low
        amax = np.maximum(np.abs(high - in_shift), np.abs(low - in_shift))
        if name == "dilate":
            return dilated(self.room, amax.max(axis=0), strength)
        if name == "smooth":
            return smooth(amax.max(axis=0), self.column_amax, strength)
        if name == "balance":
            return balance(amax, self.column_amax)
        if name == "equalize":
            return equalize(high.max(axis=0) - low.min(axis=0), self.column_range)
        return np.ones(amax.shape[1], dtype=np.float32)
