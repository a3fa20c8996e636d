"""The whole calibration: collect, choose the scaling, choose the scales, merge the bins."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from .artifacts import CalibrationError, CalibrationResult, SitePlan
from .bins import build_table
from .collect import Progress, Sampling, SiteStatistics, Statistics, collect_histograms, collect_ranges
from .denoiser import Denoiser, InputSite
from .folding import folded_weight, touching_plans
from .grid import WeightGrid
from .group import ALONE, ProcessGroup
from .hessians import stream_hessians
from .plugin import UNCHANGED, WeightPlugin
from .qtypes import FP8
from .ranges import METHODS
from .recipe import Bits, Recipe, Rule
from .rounding import ROUNDINGS
from .scales import ScaleTable, TokenScale
from .scaling import OUTPUTS, Scaling, choose_scaling
from .simulation import Simulation

Float32 = npt.NDArray[np.float32]
MARGIN = 2.0
"""Of float8's range, for results that the kept rows do not show: one exponent, which costs no precision."""
MOST = 200.0
"""dB of an output without any error."""
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
    plugin: WeightPlugin = UNCHANGED,
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

    Raises:
        CalibrationError: an input that cannot be quantized; all of them in one message.
    """
    if recipe.calibration == "progressive" and group.size > 1:
        raise CalibrationError("calibration progressive samples with one process; start it without torchrun, or take uniform")
    rules = site_rules(denoiser.sites, assigned)
    sites = tuple(site for site in denoiser.sites if site.name in rules) if samples(recipe, assigned) else ()
    if not sites:  # only weights are quantized, which the first process does alone
        if group.rank > 0:
            return None
        return _round(denoiser, recipe, {}, assigned, {}, provenance, progress, plugin)
    names = tuple(site.name for site in sites)
    statistics = collect_ranges(denoiser, names, sampling, progress, folder, group)
    if group.rank > 0 and recipe.method == "minmax" and recipe.rounding == "rtn":
        return None

    def decide(site: InputSite) -> tuple[Scaling, Float32]:
        item = statistics[site.name]
        scaling = _choose(site, item, denoiser, recipe, assigned, rules[site.name])
        return scaling, item.amax(scaling.in_scale, scaling.in_shift)

    decided = dict(zip(names, parallel(decide, sites, progress), strict=True))
    amax = {name: limit for name, (_, limit) in decided.items()}
    _refuse_constant(amax)
    plans = _plans(sites, rules, decided, statistics, denoiser, recipe, sampling, progress, folder, group)
    hessians: dict[str, Float32] = {}
    if recipe.rounding != "rtn":
        reach = {name: float(limit.max()) for name, limit in amax.items()}
        for part in stream_hessians(denoiser, plans, reach, statistics.timesteps.tolist(), sampling, progress, group):
            hessians |= part
    if group.rank > 0:
        return None
    result = _round(denoiser, recipe, plans, assigned, hessians, provenance, progress, plugin)
    if recipe.calibration == "progressive":
        with Simulation.of(denoiser, result, assigned).on(denoiser):
            statistics = collect_ranges(denoiser, names, sampling, progress, folder / "progressive")
            amax = {name: statistics[name].amax(plan.in_scale, plan.in_shift) for name, plan in plans.items()}
            decided = {name: (scaling, amax[name]) for name, (scaling, _) in decided.items()}
            plans = _plans(sites, rules, decided, statistics, denoiser, recipe, sampling, progress, folder, group)
        result = replace(result, sites=plans)
    touching = touching_plans(plans)

    def measure(site: InputSite) -> dict[str, float]:
        longest = _longest(plans[site.name], statistics[site.name])
        norms = {
            name: _longest_row(denoiser, name, touching[name], result.weight_scale[name])
            for name in site.linears
            if assigned[name].activation
        }
        return {name: float(f"{longest * norm:.2e}") for name, norm in norms.items()}

    reached = {name: item for found in parallel(measure, sites, progress) for name, item in found.items()}
    attention = _attention_scales(denoiser, plans, statistics, progress) if recipe.attention == "fp8" else {}
    correction = _corrections(denoiser, plans, statistics, assigned, result, progress) if recipe.bias_correction else {}
    result = replace(result, reach=reached, attention=attention, correction=correction)
    sqnr = _measured(denoiser, statistics, assigned, result, progress)
    return replace(result, sqnr=sqnr, timesteps=tuple(statistics.timesteps.tolist()))


def _plans(
    sites: Sequence[InputSite],
    rules: Mapping[str, Rule],
    decided: Mapping[str, tuple[Scaling, Float32]],
    statistics: Statistics,
    denoiser: Denoiser,
    recipe: Recipe,
    sampling: Sampling,
    progress: Progress,
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
            in_scale=scaling.in_scale,
            in_shift=scaling.in_shift,
            activation=_activation(
                rules[name], recipe, statistics.timesteps, limit, counts[name] if counts else NO_COUNTS, scaling
            ),
        )
    return plans


def samples(recipe: Recipe, assigned: Mapping[str, Rule]) -> bool:
    """Whether anything depends on the inputs: activation scales, scalings, or how weights are rounded."""
    asks = recipe.scaling != "none" or recipe.rounding != "rtn" or recipe.bias_correction
    return any(rule.quantizes_input or (asks and rule.action in get_args(Bits)) for rule in assigned.values())


def site_rules(sites: Sequence[InputSite], assigned: Mapping[str, Rule]) -> dict[str, Rule]:
    """By site: how its readers are quantized; sites whose readers are float or weight-only are left out.

    Raises:
        CalibrationError: readers of one input want different things; all of them in one message.
    """
    found: dict[str, Rule] = {}
    wrong = []
    for site in sites:
        rules = [assigned[name] for name in site.linears if assigned[name].action in get_args(Bits)]
        forms = {(rule.action, rule.granularity, rule.group_size): rule for rule in rules}
        if len(forms) > 1:
            told = " and ".join(" ".join(str(part) for part in form if part is not None) for form in forms)
            wrong.append(f"{', '.join(site.linears)} read one input, which cannot be {told}; give them one action")
        for rule in forms.values():
            found[site.name] = rule
    if wrong:
        raise CalibrationError("\n".join(wrong))
    return found


def _activation(
    rule: Rule, recipe: Recipe, timesteps: npt.NDArray[np.float64], amax: Float32, counts: npt.NDArray[np.int64], scaling: Scaling
) -> ScaleTable | TokenScale | None:
    """How a site's input is quantized. `amax`: at each timestep, of the scaled input."""
    qtype = rule.activation
    if rule.granularity == "token-group":
        return TokenScale(constant=1.0, group=rule.block_size(len(scaling.in_scale)))
    if qtype is None:
        return None
    if rule.granularity == "token":
        constant = float(f"{float(np.median(amax)) / qtype.qmax:.6g}")
        return TokenScale(constant=constant, clip=scaling.clip, qtype=qtype)
    scale = METHODS[recipe.method](amax * np.float32(scaling.clip), counts, recipe, qtype)
    return build_table(timesteps, scale, recipe.bins, qtype)


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


def _round(
    denoiser: Denoiser,
    recipe: Recipe,
    plans: Mapping[str, SitePlan],
    assigned: Mapping[str, Rule],
    hessians: Mapping[str, Float32],
    provenance: Mapping[str, str],
    progress: Progress,
    plugin: WeightPlugin,
) -> CalibrationResult:
    """Grids and codes of every quantized weight as it will be once all scalings are folded in.

    Raises:
        CalibrationError: a linear whose width the blocks do not divide; all of them in one message.
    """
    names = [name for name, rule in assigned.items() if rule.weight]
    touching = touching_plans(plans)
    site_of = {name: plan.site.name for plan in plans.values() for name in plan.site.linears}

    def measure(name: str) -> tuple[WeightGrid, Float32 | None] | str:
        weight = folded_weight(plugin.prepare(name, denoiser.weight(name)), name, touching.get(name, ()))
        site = site_of.get(name, "")
        in_scale = plans[site].in_scale if site else np.ones(weight.shape[1], dtype=np.float32)
        hessian = plugin.hessian(name, hessians.get(site), in_scale)
        try:
            grid, codes = ROUNDINGS[recipe.rounding](weight, assigned[name], hessian)
            # The graph holds the checkpoint's weights: codes of any others are kept.
            return grid, grid.codes(weight) if codes is None and plugin is not UNCHANGED else codes
        except ValueError as error:
            return f"'{name}': {error}"

    found = dict(zip(names, parallel(measure, names, progress), strict=True))
    wrong = [item for item in found.values() if isinstance(item, str)]
    if wrong:
        raise CalibrationError("\n".join(wrong))
    made = {name: item for name, item in found.items() if not isinstance(item, str)}
    return CalibrationResult(
        sites=plans,
        weight_scale={name: grid.scale for name, (grid, _) in made.items()},
        multiplier={name: grid.multiplier for name, (grid, _) in made.items() if grid.multiplier is not None},
        codes={name: _stored(codes, assigned[name]) for name, (_, codes) in made.items() if codes is not None},
        provenance=provenance,
    )


def _stored(codes: Float32, rule: Rule) -> npt.NDArray[np.int8]:
    if rule.weight == FP8:
        raise CalibrationError(f"{rule.action} keeps no codes of its own; take rounding rtn, and no plug-in")
    return codes.astype(np.int8)


def _corrections(
    denoiser: Denoiser,
    plans: Mapping[str, SitePlan],
    statistics: Statistics,
    assigned: Mapping[str, Rule],
    result: CalibrationResult,
    progress: Progress,
) -> dict[str, Float32]:
    """By linear: the mean over the kept rows of what quantization takes from its output, float32[out].

    Source: AWEQ (arXiv 2311.01305); b' = b + E[W x - Q(W) Q(x)].
    """
    touching = touching_plans(plans)

    def measure(plan: SitePlan) -> dict[str, Float32]:
        item = statistics[plan.site.name]
        exact = ((item.rows - plan.in_shift) / plan.in_scale).mean(axis=0, dtype=np.float64)
        rounded = plan.quantized(item.rows, item.timesteps[item.row_step]).mean(axis=0, dtype=np.float64)
        found = {}
        for name in plan.site.linears:
            qtype = assigned[name].weight
            if qtype is None:
                continue
            weight = folded_weight(denoiser.weight(name), name, touching[name])
            found[name] = (weight @ exact - result.rounded(name, weight, qtype) @ rounded).astype(np.float32)
        return found

    return {name: item for found in parallel(measure, list(plans.values()), progress) for name, item in found.items()}


def _measured(
    denoiser: Denoiser, statistics: Statistics, assigned: Mapping[str, Rule], result: CalibrationResult, progress: Progress
) -> dict[str, Float32]:
    """By linear: dB of up to OUTPUTS of its outputs at each timestep, float32[T]."""
    touching = touching_plans(result.sites)

    def measure(plan: SitePlan) -> dict[str, Float32]:
        item = statistics[plan.site.name]
        exact = ((item.rows - plan.in_shift) / plan.in_scale).astype(np.float32)
        rounded, found = plan.quantized(item.rows, item.timesteps[item.row_step]), {}
        for name in plan.site.linears:
            qtype = assigned[name].weight
            if qtype is None:
                continue
            weight = folded_weight(denoiser.weight(name), name, touching[name])
            chosen = np.linspace(0, len(weight) - 1, min(len(weight), OUTPUTS)).round().astype(np.int64)
            nearest = result.rounded(name, weight, qtype)[chosen]
            signal = exact @ weight[chosen].T
            moved = weight[chosen] @ plan.in_shift  # which the bias brings: part of what the output is
            noise = signal - rounded @ nearest.T - (result.correction[name][chosen] if name in result.correction else 0)
            powers = [
                np.bincount(item.row_step, np.square(value).mean(axis=1), len(item.timesteps))
                for value in (signal + moved, noise)
            ]
            with np.errstate(divide="ignore", invalid="ignore"):
                found[name] = np.minimum(np.round(10 * np.log10(powers[0] / powers[1]), 1), MOST).astype(np.float32)
        return found

    plans = list(result.sites.values())
    return {name: value for found in parallel(measure, plans, progress) for name, value in found.items()}


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
    rule: Rule,
) -> Scaling:
    weights = [denoiser.weight(name) for name in site.linears]
    quantized = np.concatenate(
        [np.full(len(w), assigned[name].action in get_args(Bits)) for name, w in zip(site.linears, weights, strict=True)]
    )
    return choose_scaling(statistics, np.concatenate(weights), recipe, quantized=quantized, rule=rule)
