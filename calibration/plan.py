"""The whole calibration: collect, choose the scaling, choose the scales, merge the bins."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .artifacts import CalibrationError, CalibrationResult, SitePlan
from .bins import build_table
from .collect import Progress, Sampling, SiteStatistics, collect_histograms, collect_ranges
from .denoiser import Denoiser, InputSite
from .ranges import METHODS, block_scale, weight_scale
from .recipe import Recipe, Rule
from .scaling import Scaling, choose_scaling

Float32 = npt.NDArray[np.float32]
BLOCK_SIZES = (128, 64, 32, 16)


def calibrate(
    denoiser: Denoiser,
    recipe: Recipe,
    assigned: Mapping[str, Rule],
    sampling: Sampling,
    provenance: Mapping[str, str],
    progress: Progress,
) -> CalibrationResult:
    """Decide every in_scale, in_shift, scale table and weight scale of an export.

    Args:
        assigned: the deciding rule of every linear, from `Recipe.assign`.
        progress: called with (network calls done, in all); methods that clip sample the same pictures twice.

    Raises:
        CalibrationError: an input that cannot be quantized; all of them in one message.
    """
    sites = tuple(site for site in denoiser.sites if any(assigned[name].action == "w8a8" for name in site.linears))
    names = tuple(site.name for site in sites)
    passes = 1 if recipe.method == "minmax" else 2
    first = collect_ranges(denoiser, names, sampling, lambda done, total: progress(done, total * passes))
    scalings = {site.name: _choose(site, first[site.name], denoiser, recipe, assigned) for site in sites}
    amax = {name: first[name].amax(s.in_scale, s.in_shift) for name, s in scalings.items()}
    _refuse_constant(amax)
    counts: dict[str, npt.NDArray[np.int64]] = {}
    if passes == 2:
        transforms = {name: (s.in_scale, s.in_shift) for name, s in scalings.items()}
        counts = collect_histograms(
            denoiser, transforms, amax, sampling, lambda done, total: progress(total + done, total * passes)
        )
    plans = {}
    for site in sites:
        name, scaling = site.name, scalings[site.name]
        scale = METHODS[recipe.method](amax[name], counts.get(name, np.zeros((0, 1), dtype=np.int64)), recipe)
        plans[name] = SitePlan(
            site=site,
            method=scaling.method,
            error=scaling.error,
            in_scale=scaling.in_scale,
            in_shift=scaling.in_shift,
            activation=build_table(first[name].timesteps, scale, recipe.bins),
        )
    scales = weight_scales(denoiser, plans, assigned)
    return CalibrationResult(sites=plans, weight_scale=scales, provenance=provenance)


def weight_scales(denoiser: Denoiser, plans: Mapping[str, SitePlan], assigned: Mapping[str, Rule]) -> dict[str, Float32]:
    """The scale of every quantized weight as it will be once all scalings are folded in.

    Raises:
        CalibrationError: a weight-only linear whose width no block size divides; all of them in one message.
    """
    scales: dict[str, Float32] = {}
    wrong = []
    for name, rule in assigned.items():
        if rule.action == "float":
            continue
        weight = folded_weight(denoiser, name, plans)
        if rule.action == "w8a8":
            scales[name] = weight_scale(weight)
            continue
        block = next((size for size in BLOCK_SIZES if weight.shape[1] % size == 0), 0)
        if block:
            scales[name] = block_scale(weight, block)
        else:
            wrong.append(f"'{name}' has {weight.shape[1]} inputs, which no block size of {BLOCK_SIZES} divides; make it float")
    if wrong:
        raise CalibrationError("\n".join(wrong))
    return scales


def folded_weight(denoiser: Denoiser, linear: str, plans: Mapping[str, SitePlan]) -> Float32:
    """float32[out, in]: a linear's weight after every scaling that touches it: columns times the in_scale of its own
    input, rows divided by the in_scale of the input that it produces."""
    weight = denoiser.weight(linear)
    for plan in plans.values():
        if linear in plan.site.linears:
            weight = weight * plan.in_scale
    for plan in plans.values():
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
    site: InputSite, statistics: SiteStatistics, denoiser: Denoiser, recipe: Recipe, assigned: Mapping[str, Rule]
) -> Scaling:
    weights = [denoiser.weight(name) for name in site.linears]
    quantized = np.concatenate(
        [np.full(len(w), assigned[name].action == "w8a8") for name, w in zip(site.linears, weights, strict=True)]
    )
    return choose_scaling(statistics, np.concatenate(weights), recipe, quantized=quantized)
