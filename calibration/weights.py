"""The grids and codes of all quantized weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationError, CalibrationResult, SitePlan
from dq_export.core.folding import folded_weight, touching_plans, work_bytes
from dq_export.core.grid import WeightGrid
from dq_export.core.scheme import Scheme

from .channel_bits import mixed
from .context import Calibration
from .hessians import Moments, pairs_of
from .parallel import parallel
from .plugin import UNCHANGED
from .rounding import ROUNDINGS

Float32 = npt.NDArray[np.float32]
FACTORS = 20
"""Bytes per element of a Hessian that is factorized: itself in float32, and two matrices in float64."""


def factor_bytes(width: int) -> int:
    """Bytes that rounding by the second moments of `width` inputs takes, in addition to the work on the weight."""
    return FACTORS * width**2


def round_weights(
    calibration: Calibration, plans: Mapping[str, SitePlan], hessians: Iterable[dict[str, Moments]]
) -> CalibrationResult:
    """Grids and codes of every quantized weight, with all scalings folded in.

    Args:
        hessians: by site, from `stream_hessians`; each part is used and emptied before the next one is requested.

    Raises:
        CalibrationError: a linear whose width the blocks do not divide; all of them in one message.
    """
    denoiser, assigned, plugin, tables = calibration.denoiser, calibration.assigned, calibration.plugin, calibration.tables
    rounding, mean = ROUNDINGS[calibration.recipe.first_rounding], calibration.recipe.channel_bits
    touching = touching_plans(plans)
    site_of = {name: plan.site.name for plan in plans.values() for name in plan.site.linears}

    def measure(part: Mapping[str, Moments], name: str) -> tuple[WeightGrid, npt.NDArray[np.int8] | None] | str:
        scheme, around = assigned[name].scheme, touching.get(name, ())
        assert scheme.weight is not None
        if (imported := tables.rounded(name, scheme.weight.qtype, around)) is not None:
            return imported
        site = site_of.get(name, "")
        in_scale = plans[site].in_scale if site else np.ones(denoiser.linears[name].width, dtype=np.float32)
        weight = folded_weight(tables.weight(name, plugin.prepare(name, denoiser.weight(name)), in_scale), name, around)
        try:
            moments = part.get(site)
            hessian = plugin.hessian(name, None if moments is None else moments.whole(), in_scale)
            if scheme.mixes_widths and mean is not None:
                grid, codes = mixed(weight, scheme, hessian, mean, rounding)
            else:
                grid, codes = rounding(weight, scheme, hessian)
        except ValueError as error:
            return f"'{name}': {error}"
        if codes is None and (plugin is not UNCHANGED or tables.has_weight(name)):
            codes = grid.codes(weight)  # the graph holds the checkpoint's weights, so codes of other weights must be stored
        return grid, None if codes is None else _stored(codes, scheme)

    names = [name for name, rule in assigned.items() if rule.scheme.weight]
    results: dict[str, tuple[WeightGrid, npt.NDArray[np.int8] | None] | str] = {}
    gptq, linears = calibration.recipe.first_rounding == "gptq", denoiser.linears
    for part in chain(hessians, [dict[str, Moments]()]):
        now = [name for name in names if name not in results and (not part or site_of.get(name) in part)]
        widths = {name: linears[name].width if gptq and pairs_of(linears[name]) else 0 for name in now}
        space = calibration.space // 2  # the part itself takes the other half
        for width in sorted(set(widths.values())):  # as many threads as fit: more of them for narrow weights
            item_bytes, equal = work_bytes(denoiser) + factor_bytes(width), [name for name in now if widths[name] == width]
            measured = parallel(partial(measure, part), equal, calibration.progress, item_bytes, space, "weights")
            results |= zip(equal, measured, strict=True)
        part.clear()
    wrong = [item for item in results.values() if isinstance(item, str)]
    if wrong:
        raise CalibrationError("\n".join(wrong))
    rounded = {name: item for name in names if not isinstance(item := results[name], str)}
    return CalibrationResult(
        sites=plans,
        weight_scale={name: grid.scale for name, (grid, _) in rounded.items()},
        multiplier={name: grid.multiplier for name, (grid, _) in rounded.items() if grid.multiplier is not None},
        codes={name: codes for name, (_, codes) in rounded.items() if codes is not None},
        correction=tables.corrections(denoiser, touching),
        provenance=calibration.provenance,
    )


def _stored(codes: Float32, scheme: Scheme) -> npt.NDArray[np.int8]:
    if scheme.weight is None or scheme.weight.qtype.is_float:
        raise CalibrationError(f"{scheme.name} does not store codes; use rounding rtn and no plug-in")
    return codes.astype(np.int8)
