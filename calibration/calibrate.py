"""The calibration, phase by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationError, CalibrationResult, SitePlan
from dq_export.core.network import InputSite
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable, TokenScale
from dq_export.core.scheme import Scheme, scheme_of

from .bins import build_table
from .channel_bits import narrow
from .collect.histograms import collect_histograms
from .collect.statistics import SiteStatistics, Statistics, collect_ranges
from .context import Calibration
from .hessians import Moments, stream_hessians
from .measures import attention_scales, mean_errors, reach_of, sqnr_by_timestep
from .plugin import UNCHANGED
from .ranges import method_of
from .scaling import Scaling, choose_scaling
from .simulation import Simulation
from .weights import round_weights

Float32 = npt.NDArray[np.float32]
NO_COUNTS: npt.NDArray[np.int64] = np.zeros((0, 1), dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """How a site's input is scaled, and `amax`: float32[T], the range at each timestep after the scaling."""

    site: InputSite
    scheme: Scheme
    scaling: Scaling
    amax: Float32


def calibrate(calibration: Calibration) -> CalibrationResult | None:
    """Decide every in_scale, in_shift, scale table and weight scale of an export.

    Phases: collect the ranges, choose the scalings, decide the scales, round the weights, collect the ranges of the
    quantized network (`progressive`), and measure the error.

    Returns:
        The result on the first process, bit for bit equal to that of a single process; None on the others.

    Raises:
        CalibrationError: an input that cannot be quantized; all of them in one message.
    """
    recipe, group = calibration.recipe, calibration.group
    if recipe.calibration == "progressive" and group.size > 1:
        raise CalibrationError("calibration progressive samples with one process; start it without torchrun, or use uniform")
    schemes = site_schemes(calibration.denoiser.sites, calibration.assigned)
    if not samples(recipe, calibration.assigned) or not schemes:  # only weights, which the first process rounds
        return _rounded(calibration, {}, ()) if group.rank == 0 else None
    statistics = collect_ranges(calibration.calls, tuple(schemes), calibration.folder)
    if group.rank > 0 and recipe.method == "minmax" and recipe.first_rounding == "rtn":
        return None
    decisions = _choose_scalings(calibration, schemes, statistics)
    plans = _plans(calibration, decisions, statistics.timesteps, calibration.folder)
    hessians = _hessians(calibration, decisions, plans, statistics.timesteps)
    if group.rank > 0:
        for part in hessians:
            part.clear()
        return None
    result = _rounded(calibration, plans, hessians)
    if recipe.calibration == "progressive":
        statistics, result = _refined(calibration, decisions, result)
    return measured(calibration, statistics, result)


def _choose_scalings(calibration: Calibration, schemes: Mapping[str, Scheme], statistics: Statistics) -> list[Decision]:
    """The scaling of every site; sites that share one are judged together.

    Raises:
        CalibrationError: a shift removes an input entirely.
    """
    denoiser, assigned, recipe, tables = calibration.denoiser, calibration.assigned, calibration.recipe, calibration.tables
    groups: dict[str, list[InputSite]] = {}
    for site in denoiser.sites:
        if site.name in schemes:
            groups.setdefault(site.shares or site.name, []).append(site)

    def decide(group: list[InputSite]) -> list[Decision]:
        items = [statistics[site.name] for site in group]
        if (imported := tables.scalings.get(group[0].name)) is not None:
            return decisions_of(group, items, imported)
        linears = [name for site in group for name in site.linears]
        quantized = [name for name in linears if assigned[name].scheme.low_precision]
        scheme = next(schemes[site.name] for site in group if schemes[site.name].low_precision)
        if recipe.channel_bits is not None and scheme.mixes_widths:
            scheme = narrow(scheme, recipe.channel_bits)
        taps = group[0].fold.taps(denoiser.linears[linears[0]].width)
        scaling = choose_scaling(
            reduce(SiteStatistics.joined, items),
            [denoiser.weight(name) for name in quantized],
            recipe if group[0].fold.shifts else recipe.model_copy(update={"shift": False}),
            scheme=scheme,
            free=group[0].fold.kind != "token" or taps > 1,  # the Mul is cheap beside a convolution of 3 x 3 pixels
            taps=taps,
        )
        return decisions_of(group, items, scaling)

    def decisions_of(group: list[InputSite], items: list[SiteStatistics], scaling: Scaling) -> list[Decision]:
        return [
            Decision(site=site, scheme=schemes[site.name], scaling=scaling, amax=item.amax(scaling.in_scale, scaling.in_shift))
            for site, item in zip(group, items, strict=True)
        ]

    decided = {item.site.name: item for group in calibration.for_each(decide, list(groups.values())) for item in group}
    decisions = [decided[site.name] for site in denoiser.sites if site.name in decided]
    constant = [item.site.name for item in decisions if not item.amax.any() and item.site.name not in tables.activations]
    if constant:
        raise CalibrationError(
            "\n".join(
                f"the input of '{name}' never changes, so a shift leaves no scale; pass --no-shift, or exclude it: "
                f"--exclude '{name}'"
                for name in constant
            )
        )
    return decisions


def _rounded(
    calibration: Calibration, plans: Mapping[str, SitePlan], hessians: Iterable[dict[str, Moments]]
) -> CalibrationResult:
    """The codes of all weights.

    Raises:
        CalibrationError: see `round_weights`; or the graph's float16 rounds a scale to 0. All of them in one message.
    """
    result = round_weights(calibration, plans, hessians)
    if calibration.recipe.dtype != "fp16":
        return result
    scales = {name: scale.min() for name, scale in result.weight_scale.items()}
    scales |= {
        name: min(scales.get(name, np.inf), plan.activation.scale.min())
        for name, plan in result.sites.items()
        if isinstance(plan.activation, ScaleTable)
    }
    wrong = [
        f"'{name}': float16 rounds its scale of {scale:.1g} to 0; pass --dtype bf16 or fp32, or leave it float with --exclude"
        for name, scale in scales.items()
        if np.float16(scale) == 0
    ]
    if wrong:
        raise CalibrationError("\n".join(wrong))
    return result


def _plans(
    calibration: Calibration, decisions: Sequence[Decision], timesteps: npt.NDArray[np.float64], folder: Path
) -> dict[str, SitePlan]:
    """A plan for every site, from its scaling and the range at each timestep."""
    counts: Mapping[str, npt.NDArray[np.int64]] = {}
    if calibration.recipe.method != "minmax":
        transforms = {item.site.name: (item.scaling.in_scale, item.scaling.in_shift) for item in decisions}
        counts = collect_histograms(calibration.calls, transforms, {item.site.name: item.amax for item in decisions}, folder)
    return {
        item.site.name: SitePlan(
            site=item.site,
            method=item.scaling.method,
            error=item.scaling.error,
            alternatives=item.scaling.alternatives,
            in_scale=item.scaling.in_scale,
            in_shift=item.scaling.in_shift,
            activation=calibration.tables.activations.get(item.site.name)
            or _activation(item, calibration.recipe, timesteps, counts[item.site.name] if counts else NO_COUNTS),
        )
        for item in decisions
    }


def _hessians(
    calibration: Calibration,
    decisions: Sequence[Decision],
    plans: Mapping[str, SitePlan],
    timesteps: npt.NDArray[np.float64],
) -> Iterable[dict[str, Moments]]:
    """The second moments for the rounding of the weights; none if weights are rounded to nearest."""
    rounding = calibration.recipe.first_rounding
    if rounding == "rtn":
        return ()
    reach = {item.site.name: float(item.amax.max()) for item in decisions}
    diagonal = rounding == "mse" and calibration.plugin is UNCHANGED
    return stream_hessians(calibration.calls, plans, reach, timesteps.tolist(), calibration.space, diagonal=diagonal)


def _refined(
    calibration: Calibration, decisions: Sequence[Decision], result: CalibrationResult
) -> tuple[Statistics, CalibrationResult]:
    """Statistics of the quantized network's inputs, and the result with scales from these statistics."""
    with Simulation.of(calibration.denoiser, result, calibration.assigned).on(calibration.denoiser):
        statistics = collect_ranges(calibration.calls, tuple(result.sites), calibration.folder / "progressive")
        scaled = []
        for item in decisions:
            amax = statistics[item.site.name].amax(item.scaling.in_scale, item.scaling.in_shift)
            scaled.append(replace(item, amax=amax))
        plans = _plans(calibration, scaled, statistics.timesteps, calibration.folder)
    return statistics, replace(result, sites=plans)


def measured(calibration: Calibration, statistics: Statistics, result: CalibrationResult) -> CalibrationResult:
    """The result with the numbers measured on the kept rows: reaches, float8 scales, corrections, and errors."""
    denoiser, assigned, progress = calibration.denoiser, calibration.assigned, calibration.progress
    reached = reach_of(denoiser, statistics, assigned, result, progress)
    attention: Mapping[str, float] = {}
    correction = result.correction
    if calibration.recipe.attention_type is not None:
        attention = attention_scales(denoiser, result.sites, statistics, progress)
    if calibration.recipe.bias_correction:
        correction = mean_errors(denoiser, statistics, assigned, result, progress)
    result = replace(result, reach=reached, attention=attention, correction=correction)
    sqnr = sqnr_by_timestep(denoiser, statistics, assigned, result, progress)
    return replace(result, sqnr=sqnr, timesteps=tuple(statistics.timesteps.tolist()))


def samples(recipe: Recipe, assigned: Mapping[str, Rule]) -> bool:
    """Whether anything depends on the inputs: activation scales, scalings, or how weights are rounded."""
    asks = recipe.scaling != "none" or recipe.first_rounding != "rtn" or recipe.bias_correction
    return any(rule.scheme.activation or (asks and rule.scheme.low_precision) for rule in assigned.values())


def site_schemes(sites: Sequence[InputSite], assigned: Mapping[str, Rule]) -> dict[str, Scheme]:
    """For each site, how its readers are quantized. Sites whose readers are float or weight-only are left out, except those
    that share the scaling of a quantized site.

    Raises:
        CalibrationError: readers of one input have different schemes; all of them in one message.
    """
    by_site: dict[str, Scheme] = {}
    wrong = []
    for site in sites:
        schemes = dict.fromkeys(assigned[name].scheme for name in site.linears if assigned[name].scheme.low_precision)
        if len(schemes) > 1:
            both = " and ".join(str(scheme) for scheme in schemes)
            wrong.append(f"{', '.join(site.linears)} read one input, which cannot be {both}; give them one action")
        for scheme in schemes:
            by_site[site.name] = scheme
    if wrong:
        raise CalibrationError("\n".join(wrong))
    scaled = {site.shares or site.name for site in sites if site.name in by_site}
    return {site.name: by_site.get(site.name, scheme_of("float")) for site in sites if (site.shares or site.name) in scaled}


def _activation(
    decision: Decision, recipe: Recipe, timesteps: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]
) -> ScaleTable | TokenScale | None:
    """How a site's input is quantized. `counts`: see `collect_histograms`; empty if the method does not need them."""
    scheme, scaling, amax = decision.scheme, decision.scaling, decision.amax
    activation, qtype = scheme.activation, scheme.graph_type
    if activation is None:
        return None
    if qtype is None:
        return TokenScale(constant=1.0, group=activation.size or 0)
    if scheme.per_token:
        constant = float(f"{float(np.median(amax)) / qtype.qmax:.6g}")
        return TokenScale(constant=constant, clip=scaling.clip, qtype=qtype)
    scale = method_of(recipe.method)(amax * np.float32(scaling.clip), counts, recipe, qtype)
    return build_table(timesteps, scale, recipe.bins, qtype)
