"""Measurements of a finished calibration on the kept rows: errors by linear and timestep, and the range of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.compare import decibels
from dq_export.core.folding import folded_weight, touching_plans, work_bytes
from dq_export.core.network import Denoiser
from dq_export.core.progress import Advance
from dq_export.core.qtypes import FP8
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable

from .collect.statistics import SiteStatistics, Statistics
from .parallel import parallel
from .scaling import OUTPUTS

Float32 = npt.NDArray[np.float32]
MARGIN = 2.0
"""Headroom in float8's range for results that the kept rows do not show: one exponent, which costs no precision."""


def mean_errors(
    denoiser: Denoiser, statistics: Statistics, assigned: Mapping[str, Rule], result: CalibrationResult, progress: Advance
) -> dict[str, Float32]:
    """For each linear, the mean error of its output by quantization over the kept rows, float32[out].

    Source: AWEQ (arXiv 2311.01305); b' = b + E[W x - Q(W) Q(x)].
    """
    touching = touching_plans(result.sites)

    def measure(plan: SitePlan) -> dict[str, Float32]:
        item = statistics[plan.site.name]
        exact = ((item.rows - plan.in_shift) / plan.in_scale).mean(axis=0, dtype=np.float64)
        rounded = plan.quantized(item.rows, item.timesteps[item.row_step]).mean(axis=0, dtype=np.float64)
        results = {}
        for name in plan.site.linears:
            scheme = assigned[name].scheme
            if scheme.weight is None:
                continue
            weight = folded_weight(denoiser.weight(name), name, touching[name])
            results[name] = (weight @ exact - result.rounded(name, weight, scheme.weight.qtype) @ rounded).astype(np.float32)
        return results

    plans = list(result.sites.values())
    return {name: item for results in parallel(measure, plans, progress, work_bytes(denoiser)) for name, item in results.items()}


def sqnr_by_timestep(
    denoiser: Denoiser, statistics: Statistics, assigned: Mapping[str, Rule], result: CalibrationResult, progress: Advance
) -> dict[str, Float32]:
    """For each linear, the SQNR in dB over up to OUTPUTS of its outputs at each timestep, float32[T]."""
    touching = touching_plans(result.sites)

    def measure(plan: SitePlan) -> dict[str, Float32]:
        item = statistics[plan.site.name]
        # In float64: runs must give equal figures, and the order of float32 sums could change how a figure is rounded.
        exact = ((item.rows - plan.in_shift) / plan.in_scale).astype(np.float32).astype(np.float64)
        rounded, results = plan.quantized(item.rows, item.timesteps[item.row_step]).astype(np.float64), {}
        for name in plan.site.linears:
            scheme = assigned[name].scheme
            if scheme.weight is None:
                continue
            whole = folded_weight(denoiser.weight(name), name, touching[name])
            chosen = np.linspace(0, len(whole) - 1, min(len(whole), OUTPUTS)).round().astype(np.int64)
            part = whole[chosen]
            del whole  # the largest part of a thread's memory
            weight, nearest = part.astype(np.float64), result.rounded(name, part, scheme.weight.qtype, chosen).astype(np.float64)
            signal = exact @ weight.T
            moved = weight @ plan.in_shift  # the bias adds it to the output
            noise = signal - rounded @ nearest.T - (result.correction[name][chosen] if name in result.correction else 0)
            powers = [
                np.bincount(item.row_step, np.square(value).mean(axis=1), len(item.timesteps))
                for value in (signal + moved, noise)
            ]
            ratio = np.where(powers[0] + powers[1] > 0, decibels(*powers), np.nan)  # NaN: no row of the timestep was kept
            results[name] = np.round(ratio, 1).astype(np.float32)
        return results

    plans = list(result.sites.values())
    return {
        name: value for results in parallel(measure, plans, progress, work_bytes(denoiser)) for name, value in results.items()
    }


def reach_of(
    denoiser: Denoiser, statistics: Statistics, assigned: Mapping[str, Rule], result: CalibrationResult, progress: Advance
) -> dict[str, float]:
    """For each linear whose input the graph quantizes, the number of `CalibrationResult.reach`."""
    touching = touching_plans(result.sites)

    def measure(plan: SitePlan) -> dict[str, float]:
        longest = _longest(plan, statistics[plan.site.name])
        norms = {
            name: _longest_row(denoiser, name, touching[name], result.weight_scale[name])
            for name in plan.site.linears
            if assigned[name].scheme.graph_type
        }
        return {name: float(f"{longest * norm:.2e}") for name, norm in norms.items()}

    plans = list(result.sites.values())
    return {name: item for results in parallel(measure, plans, progress, work_bytes(denoiser)) for name, item in results.items()}


def _longest(plan: SitePlan, statistics: SiteStatistics) -> float:
    """The greatest Euclidean length of a kept row's codes."""
    rows = (statistics.rows - plan.in_shift) / plan.in_scale
    if isinstance(plan.activation, ScaleTable):
        steps = plan.activation.scale[plan.activation.bins.index(statistics.timesteps[statistics.row_step])][:, None]
    elif plan.activation:
        steps = np.abs(rows).max(axis=1, keepdims=True) / plan.activation.qtype.qmax
    else:
        return 0.0
    return float(np.linalg.norm(rows / np.where(steps > 0, steps, 1.0), axis=1).max())


def _longest_row(denoiser: Denoiser, name: str, plans: Sequence[SitePlan], scale: Float32) -> float:
    """The greatest Euclidean length of an output channel's codes."""
    return float((np.linalg.norm(folded_weight(denoiser.weight(name), name, plans), axis=1) / scale).max())


def attention_scales(
    denoiser: Denoiser, plans: Mapping[str, SitePlan], statistics: Mapping[str, SiteStatistics], progress: Advance
) -> dict[str, float]:
    """For each projection, MARGIN times its greatest |result| over the kept rows / 448; of value projections after folding.

    Sites that stay float have no kept rows; their attention stays float, too.
    """
    touching = touching_plans(plans)
    names = [(site, name) for group in denoiser.attention for name in group for site in _site_of(plans, name)]

    def measure(pair: tuple[str, str]) -> float:
        site, name = pair
        result = statistics[site].rows @ denoiser.weight(name).T + denoiser.bias(name)
        for plan in touching[name]:
            for part in plan.site.fold.rows_of(name):
                result = part.moved(result, plan.channel_scale, plan.in_shift)
        return float(f"{MARGIN * float(np.abs(result).max()) / FP8.qmax:.6g}")

    return dict(zip([name for _, name in names], parallel(measure, names, progress, work_bytes(denoiser)), strict=True))


def _site_of(plans: Mapping[str, SitePlan], linear: str) -> list[str]:
    return [name for name, plan in plans.items() if linear in plan.site.linears]
