"""The whole calibration: collect, choose the scaling, choose the scales, merge the bins."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from .artifacts import CalibrationError, CalibrationResult, SitePlan
from .bins import build_table
from .collect import Progress, Sampling, SiteStatistics, collect_histograms, collect_ranges
from .denoiser import Denoiser, InputSite
from .group import ALONE, ProcessGroup
from .qtypes import FP8, QuantType
from .ranges import METHODS, block_scale, weight_scale
from .recipe import Recipe, Rule
from .scaling import Scaling, choose_scaling

Float32 = npt.NDArray[np.float32]
MARGIN = 2.0
"""Of float8's range, for results that the kept rows do not show: one exponent, which costs no precision."""
BLOCK_SIZES = (128, 64, 32, 16)
NO_COUNTS: npt.NDArray[np.int64] = np.zeros((0, 1), dtype=np.int64)
Item = TypeVar("Item")
Result = TypeVar("Result")


def calibrate(
    denoiser: Denoiser,
    recipe: Recipe,
    assigned: Mapping[str, Rule],
    sampling: Sampling,
    provenance: Mapping[str, str],
    progress: Progress,
    folder: Path,
    group: ProcessGroup = ALONE,
) -> CalibrationResult | None:
    """Decide every in_scale, in_shift, scale table and weight scale of an export.

    Args:
        assigned: the deciding rule of every linear, from `Recipe.assign`.
        progress: called with (done, in all) of each phase in turn: network calls, inputs, weights. Methods that clip
            sample the same pictures twice.
        folder: where statistics lie meanwhile; the caller's to delete.
        group: the processes that share the sampling. The first gets the result, bit for bit that of one process alone;
            the others get None.

    Raises:
        CalibrationError: an input that cannot be quantized; all of them in one message.
    """
    types = activation_types(denoiser.sites, assigned)
    sites = tuple(site for site in denoiser.sites if site.name in types)
    if not sites:  # only weights are quantized, which the first process does alone
        if group.rank > 0:
            return None
        scales = weight_scales(denoiser, {}, assigned, progress)
        return CalibrationResult(sites={}, weight_scale=scales, provenance=provenance)
    names = tuple(site.name for site in sites)
    statistics = collect_ranges(denoiser, names, sampling, progress, folder, group)
    if group.rank > 0 and recipe.method == "minmax":
        return None

    def decide(site: InputSite) -> tuple[Scaling, Float32]:
        item = statistics[site.name]
        scaling = _choose(site, item, denoiser, recipe, assigned, types[site.name])
        return scaling, item.amax(scaling.in_scale, scaling.in_shift)

    decided = dict(zip(names, parallel(decide, sites, progress), strict=True))
    amax = {name: limit for name, (_, limit) in decided.items()}
    _refuse_constant(amax)
    counts: Mapping[str, npt.NDArray[np.int64]] = {}
    if recipe.method != "minmax":
        transforms = {name: (scaling.in_scale, scaling.in_shift) for name, (scaling, _) in decided.items()}
        counts = collect_histograms(denoiser, transforms, amax, sampling, progress, folder, group)
        if group.rank > 0:
            return None
    plans = {}
    for site in sites:
        name, scaling = site.name, decided[site.name][0]
        scale = METHODS[recipe.method](amax[name], counts[name] if counts else NO_COUNTS, recipe, types[name])
        plans[name] = SitePlan(
            site=site,
            method=scaling.method,
            error=scaling.error,
            in_scale=scaling.in_scale,
            in_shift=scaling.in_shift,
            activation=build_table(statistics.timesteps, scale, recipe.bins, types[name]),
        )
    scales = weight_scales(denoiser, plans, assigned, progress)
    touching = _touching(plans)

    def measure(site: InputSite) -> dict[str, float]:
        longest = _longest(plans[site.name], statistics[site.name])
        norms = {name: _longest_row(denoiser, name, touching[name], scales[name]) for name in site.linears if name in scales}
        return {name: float(f"{longest * norm:.2e}") for name, norm in norms.items()}

    reach = {name: item for found in parallel(measure, sites, progress) for name, item in found.items()}
    attention = _attention_scales(denoiser, plans, statistics, progress) if recipe.attention == "fp8" else {}
    return CalibrationResult(sites=plans, weight_scale=scales, provenance=provenance, reach=reach, attention=attention)


def activation_types(sites: Sequence[InputSite], assigned: Mapping[str, Rule]) -> dict[str, QuantType]:
    """By site: what its input is quantized to; sites that stay float are left out.

    Raises:
        CalibrationError: readers of one input want different types; all of them in one message.
    """
    found: dict[str, QuantType] = {}
    wrong = []
    for site in sites:
        rules = [assigned[name] for name in site.linears]
        actions = {rule.action: qtype for rule in rules if (qtype := rule.activation)}
        if len(actions) > 1:
            wrong.append(
                f"{', '.join(site.linears)} read one input, which cannot be {' and '.join(actions)}; give them one action"
            )
        for qtype in actions.values():
            found[site.name] = qtype
    if wrong:
        raise CalibrationError("\n".join(wrong))
    return found


def parallel(work: Callable[[Item], Result], items: Sequence[Item], progress: Progress) -> list[Result]:
    """`work` of every item, in order, on as many threads as there are cores; numpy releases the interpreter's lock.

    Each multiplies its matrices on its own thread: threads of the BLAS beside ours took three times as long.
    """
    results = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(work, items):
            results.append(result)
            progress(len(results), len(items))
    return results


def weight_scales(
    denoiser: Denoiser, plans: Mapping[str, SitePlan], assigned: Mapping[str, Rule], progress: Progress
) -> dict[str, Float32]:
    """The scale of every quantized weight as it will be once all scalings are folded in.

    Raises:
        CalibrationError: a weight-only linear whose width no block size divides; all of them in one message.
    """
    names = [name for name, rule in assigned.items() if rule.action != "float"]
    touching = _touching(plans)

    def measure(name: str) -> Float32 | str:
        weight, qtype = folded_weight(denoiser.weight(name), name, touching.get(name, ())), assigned[name].weight
        assert qtype is not None
        if assigned[name].activation:
            return weight_scale(weight, qtype)
        width = weight.shape[1]
        least = 2 if qtype.bits == 4 else 1  # TensorRT unpacks a single block of int4 outside the GEMM
        block = next((size for size in BLOCK_SIZES if width % size == 0 and width // size >= least), 0)
        if block:
            return block_scale(weight, block, qtype)
        return f"'{name}' has {width} inputs, which no block size of {BLOCK_SIZES} divides; make it float"

    found = dict(zip(names, parallel(measure, names, progress), strict=True))
    wrong = [item for item in found.values() if isinstance(item, str)]
    if wrong:
        raise CalibrationError("\n".join(wrong))
    return {name: item for name, item in found.items() if not isinstance(item, str)}


def folded_weight(weight: Float32, linear: str, plans: Sequence[SitePlan]) -> Float32:
    """float32[out, in]: a linear's weight after every scaling that touches it: columns times the in_scale of its own
    input, rows divided by the in_scale of the input that it produces."""
    for plan in plans:
        if linear in plan.site.linears:
            weight = weight * plan.in_scale
    for plan in plans:
        site = plan.site
        if site.producer != linear:
            continue
        if site.fold == "value":
            weight = weight / plan.in_scale[:, None]
        elif site.fold == "modulation":
            weight = weight.copy()
            for start, stop in (site.shift_rows, site.scale_rows):
                weight[start:stop] /= plan.in_scale[:, None]
    return weight


def _longest(plan: SitePlan, statistics: SiteStatistics) -> float:
    """The greatest Euclidean length of a kept row's codes."""
    steps = plan.activation.scale[plan.activation.bins.index(statistics.timesteps[statistics.row_step])]
    rows = (statistics.rows - plan.in_shift) / (plan.in_scale * steps[:, None])
    return float(np.linalg.norm(rows, axis=1).max())


def _longest_row(denoiser: Denoiser, name: str, plans: Sequence[SitePlan], scale: Float32) -> float:
    """The greatest Euclidean length of an output channel's codes."""
    if scale.ndim > 1:
        return 0.0
    return float((np.linalg.norm(folded_weight(denoiser.weight(name), name, plans), axis=1) / scale).max())


def _attention_scales(
    denoiser: Denoiser, plans: Mapping[str, SitePlan], statistics: Mapping[str, SiteStatistics], progress: Progress
) -> dict[str, float]:
    """By projection: MARGIN times its greatest |result| over the kept rows / 448, value projections as they are folded.

    Sites that stay float keep no rows; their attention stays float, too.
    """
    value = {plan.site.producer: plan for plan in plans.values() if plan.site.fold == "value"}
    names = [(site, name) for group in denoiser.attention for name in group for site in _site_of(plans, name)]

    def measure(pair: tuple[str, str]) -> float:
        site, name = pair
        result = statistics[site].rows @ denoiser.weight(name).T + denoiser.bias(name)
        if name in value:
            result = (result - value[name].in_shift) / value[name].in_scale
        return float(f"{MARGIN * float(np.abs(result).max()) / FP8.qmax:.6g}")

    return dict(zip([name for _, name in names], parallel(measure, names, progress), strict=True))


def _site_of(plans: Mapping[str, SitePlan], linear: str) -> list[str]:
    return [name for name, plan in plans.items() if linear in plan.site.linears]


def _touching(plans: Mapping[str, SitePlan]) -> dict[str, list[SitePlan]]:
    """By linear: the plans whose scaling is folded into its weight."""
    found: dict[str, list[SitePlan]] = {}
    for plan in plans.values():
        for name in {*plan.site.linears, plan.site.producer} - {""}:
            found.setdefault(name, []).append(plan)
    return found


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
    qtype: QuantType,
) -> Scaling:
    weights = [denoiser.weight(name) for name in site.linears]
    quantized = np.concatenate(
        [np.full(len(w), assigned[name].activation is not None) for name, w in zip(site.linears, weights, strict=True)]
    )
    return choose_scaling(statistics, np.concatenate(weights), recipe, quantized=quantized, qtype=qtype)
