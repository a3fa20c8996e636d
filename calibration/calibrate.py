"""The whole calibration: collect, choose the scaling, choose the scales, merge the bins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationError, CalibrationResult, SitePlan
from dq_export.core.folding import work_bytes
from dq_export.core.network import Denoiser, InputSite
from dq_export.core.progress import Advance
from dq_export.core.recipe import Recipe, Rule
from dq_export.core.scales import ScaleTable, TokenScale
from dq_export.core.scheme import Scheme

from .bins import build_table
from .collect import Sampling, SiteStatistics, Statistics, collect_histograms, collect_ranges
from .group import ALONE, ProcessGroup
from .hessians import SPACE, stream_hessians
from .measures import attention_scales, mean_errors, reach_of, sqnr_by_timestep
from .parallel import parallel
from .plugin import UNCHANGED, WeightPlugin
from .ranges import METHODS
from .scaling import Scaling, choose_scaling
from .simulation import Simulation
from .weights import round_weights

Float32 = npt.NDArray[np.float32]
NO_COUNTS: npt.NDArray[np.int64] = np.zeros((0, 1), dtype=np.int64)


def calibrate(
    denoiser: Denoiser,
    recipe: Recipe,
    assigned: Mapping[str, Rule],
    sampling: Sampling,
    provenance: Mapping[str, str],
    progress: Advance,
    folder: Path,
    group: ProcessGroup = ALONE,
    plugin: WeightPlugin = UNCHANGED,
    space: int = SPACE,
) -> CalibrationResult | None:
    """Decide every in_scale, in_shift, scale table and weight scale of an export.

    Args:
        assigned: the deciding rule of every linear, from `Recipe.assign`.
        progress: called with (done, in all) of each phase in turn: network calls, inputs, weights. Methods that clip
            sample the same pictures twice.
        folder: where statistics lie meanwhile; the caller's to delete.
        group: the processes that share the sampling. The first gets the result, bit for bit that of one process alone;
            the others get None.
        plugin: the user's own weights and Hessians.
        space: bytes of second moments and of rounding by them, see `stream_hessians`; more of it saves runs over the
            pictures.

    Raises:
        CalibrationError: an input that cannot be quantized; all of them in one message.
    """
    if recipe.calibration == "progressive" and group.size > 1:
        raise CalibrationError("calibration progressive samples with one process; start it without torchrun, or take uniform")
    schemes = site_schemes(denoiser.sites, assigned)
    sites = tuple(site for site in denoiser.sites if site.name in schemes) if samples(recipe, assigned) else ()
    if not sites:  # only weights are quantized, which the first process does alone
        if group.rank > 0:
            return None
        return round_weights(denoiser, recipe, {}, assigned, (), provenance, progress, plugin, space)
    names = tuple(site.name for site in sites)
    statistics = collect_ranges(denoiser, names, sampling, progress, folder, group)
    if group.rank > 0 and recipe.method == "minmax" and recipe.rounding == "rtn":
        return None

    def decide(site: InputSite) -> tuple[Scaling, Float32]:
        item = statistics[site.name]
        scaling = _choose(site, item, denoiser, recipe, assigned, schemes[site.name])
        return scaling, item.amax(scaling.in_scale, scaling.in_shift)

    decided = dict(zip(names, parallel(decide, sites, progress, work_bytes(denoiser)), strict=True))
    amax = {name: limit for name, (_, limit) in decided.items()}
    _refuse_constant(amax)
    plans = _plans(sites, schemes, decided, statistics, denoiser, recipe, sampling, progress, folder, group)
    hessians: Iterable[dict[str, Float32]] = ()
    if recipe.rounding != "rtn":
        reach, order = {name: float(limit.max()) for name, limit in amax.items()}, statistics.timesteps.tolist()
        diagonal = recipe.rounding == "mse" and plugin is UNCHANGED
        hessians = stream_hessians(denoiser, plans, reach, order, sampling, progress, space, group, diagonal=diagonal)
    if group.rank > 0:
        for part in hessians:
            part.clear()
        return None
    result = round_weights(denoiser, recipe, plans, assigned, hessians, provenance, progress, plugin, space)
    if recipe.calibration == "progressive":
        with Simulation.of(denoiser, result, assigned).on(denoiser):
            statistics = collect_ranges(denoiser, names, sampling, progress, folder / "progressive")
            amax = {name: statistics[name].amax(plan.in_scale, plan.in_shift) for name, plan in plans.items()}
            decided = {name: (scaling, amax[name]) for name, (scaling, _) in decided.items()}
            plans = _plans(sites, schemes, decided, statistics, denoiser, recipe, sampling, progress, folder, group)
        result = replace(result, sites=plans)
    reached = reach_of(denoiser, statistics, assigned, result, progress)
    attention = attention_scales(denoiser, plans, statistics, progress) if recipe.attention == "fp8" else {}
    correction = mean_errors(denoiser, statistics, assigned, result, progress) if recipe.bias_correction else {}
    result = replace(result, reach=reached, attention=attention, correction=correction)
    sqnr = sqnr_by_timestep(denoiser, statistics, assigned, result, progress)
    return replace(result, sqnr=sqnr, timesteps=tuple(statistics.timesteps.tolist()))


def _plans(
    sites: Sequence[InputSite],
    schemes: Mapping[str, Scheme],
    decided: Mapping[str, tuple[Scaling, Float32]],
    statistics: Statistics,
    denoiser: Denoiser,
    recipe: Recipe,
    sampling: Sampling,
    progress: Advance,
    folder: Path,
    group: ProcessGroup,
) -> dict[str, SitePlan]:
    """A plan for every site, from its scaling and the range at each timestep."""
    counts: Mapping[str, npt.NDArray[np.int64]] = {}
    if recipe.method != "minmax":
        transforms = {name: (scaling.in_scale, scaling.in_shift) for name, (scaling, _) in decided.items()}
        amax = {name: limit for name, (_, limit) in decided.items()}
        counts = collect_histograms(denoiser, transforms, amax, sampling, progress, folder, group)
    plans = {}
    for site in sites:
        name, (scaling, limit) = site.name, decided[site.name]
        plans[name] = SitePlan(
            site=site,
            method=scaling.method,
            error=scaling.error,
            alternatives=scaling.alternatives,
            in_scale=scaling.in_scale,
            in_shift=scaling.in_shift,
            activation=_activation(
                schemes[name], recipe, statistics.timesteps, limit, counts[name] if counts else NO_COUNTS, scaling
            ),
        )
    return plans


def samples(recipe: Recipe, assigned: Mapping[str, Rule]) -> bool:
    """Whether anything depends on the inputs: activation scales, scalings, or how weights are rounded."""
    asks = recipe.scaling != "none" or recipe.rounding != "rtn" or recipe.bias_correction
    return any(rule.scheme.activation or (asks and rule.scheme.low_precision) for rule in assigned.values())


def site_schemes(sites: Sequence[InputSite], assigned: Mapping[str, Rule]) -> dict[str, Scheme]:
    """By site: how its readers are quantized; sites whose readers are float or weight-only are left out.

    Raises:
        CalibrationError: readers of one input want different things; all of them in one message.
    """
    found: dict[str, Scheme] = {}
    wrong = []
    for site in sites:
        schemes = dict.fromkeys(assigned[name].scheme for name in site.linears if assigned[name].scheme.low_precision)
        if len(schemes) > 1:
            both = " and ".join(str(scheme) for scheme in schemes)
            wrong.append(f"{', '.join(site.linears)} read one input, which cannot be {both}; give them one action")
        for scheme in schemes:
            found[site.name] = scheme
    if wrong:
        raise CalibrationError("\n".join(wrong))
    return found


def _activation(
    scheme: Scheme,
    recipe: Recipe,
    timesteps: npt.NDArray[np.float64],
    amax: Float32,
    counts: npt.NDArray[np.int64],
    scaling: Scaling,
) -> ScaleTable | TokenScale | None:
    """How a site's input is quantized. `amax`: at each timestep, of the scaled input."""
    activation, qtype = scheme.activation, scheme.graph_type
    if activation is None:
        return None
    if qtype is None:
        return TokenScale(constant=1.0, group=activation.size or 0)
    if scheme.per_token:
        constant = float(f"{float(np.median(amax)) / qtype.qmax:.6g}")
        return TokenScale(constant=constant, clip=scaling.clip, qtype=qtype)
    scale = METHODS[recipe.method](amax * np.float32(scaling.clip), counts, recipe, qtype)
    return build_table(timesteps, scale, recipe.bins, qtype)


def _refuse_constant(amax: Mapping[str, Float32]) -> None:
    constant = [name for name, limit in amax.items() if not limit.any()]
    if constant:
        raise CalibrationError(
            "\n".join(
                f"the input of '{name}' never changes, so a shift leaves no scale; pass --no-shift, or exclude it: "
                f"--exclude '{name}'"
                for name in constant
            )
        )


def _choose(
    site: InputSite,
    statistics: SiteStatistics,
    denoiser: Denoiser,
    recipe: Recipe,
    assigned: Mapping[str, Rule],
    scheme: Scheme,
) -> Scaling:
    weights = [denoiser.weight(name) for name in site.linears]
    quantized = np.concatenate(
        [np.full(len(w), assigned[name].scheme.low_precision) for name, w in zip(site.linears, weights, strict=True)]
    )
    return choose_scaling(statistics, np.concatenate(weights), recipe, quantized=quantized, scheme=scheme)
