"""The report of a run, from what its stages returned."""

from __future__ import annotations

import platform
from datetime import datetime, timezone

from dq_export.core.recipe import Recipe

from ..machine import cpu_name, installed, versions
from ..stages.audit import AUDIT
from ..stages.bench import BENCH
from ..stages.calibrate import CALIBRATE, Calibrated
from ..stages.distill import DISTILL
from ..stages.quantize import QUANTIZE
from ..stages.recording import drawn_conditions
from ..stages.stage import Context
from ..stages.triton import TRITON
from ..stages.verify import VERIFY
from .report import LinearReport, Report
from .verdict import concluded

CHOICES = (
    "bits", "granularity", "group_size", "attention", "rounding", "format", "provider", "dtype", "target", "timesteps", "method",
    "bins", "scaling", "calibration", "calib_size", "steps", "guidance_scale", "sizes", "seed",
)  # fmt: skip
"""The recipe's keys that the report shows, in this order."""


def assemble(context: Context, command: str = "") -> Report:
    """The report on the finished stages; the parts of the others are empty.

    Args:
        command: what the user typed; empty where Python called.
    """
    recipe, reference, backend, results = context.recipe, context.reference, context.backend, context.results
    calibrated = results.get(DISTILL) or results.get(CALIBRATE) or Calibrated()
    quantized, audited, verified, served, benched = (
        results.get(QUANTIZE), results.get(AUDIT), results.get(VERIFY), results.get(TRITON), results.get(BENCH),
    )  # fmt: skip
    report = Report(
        model=recipe.model,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
        recipe=_choices(recipe),
        digest=reference.digest,
        sampler=reference.sampler,
        guidance_scale=recipe.guidance_scale or 1.0,
        timesteps=recipe.timesteps,
        machine=f"{platform.machine()}, {platform.system()}, {cpu_name()}",
        versions={**versions(), **installed(backend.packages if backend else ())},
        engine=backend.title if backend else "",
        seconds=results.seconds(),
        measured_at=list(calibrated.timesteps),
        tables=list(calibrated.tables),
        linears=_linears(context, calibrated),
        passes=list(quantized.passes) if quantized else [],
        size=quantized.size if quantized else None,
        text_encoder=served.text_encoder if served else None,
        audit=audited.audit if audited else None,
        parity=verified.parity if verified else None,
        drawn=[reference.conditions.names[index] for index in drawn_conditions(reference, recipe)] if verified else [],
        pictures=verified.pictures if verified else None,
        latency=benched.latency if benched else None,
    )
    return concluded(report, recipe, results.unbuilt)


def _choices(recipe: Recipe) -> dict[str, str]:
    """The recipe's values by key, without keys that it leaves open and keys that its format does not read."""
    values = recipe.model_dump(mode="json", include=set(CHOICES))
    if recipe.plan != "trt-rtx":
        del values["target"]
    if not recipe.group_size:
        del values["group_size"]
    return {name: str(values[name]) for name in CHOICES if values.get(name) not in (None, "")}


def _linears(context: Context, calibrated: Calibrated) -> list[LinearReport]:
    """Every linear with its rule and what calibration found for its input."""
    sites = {linear: site for site in calibrated.sites for linear in site.linears}
    linears = []
    for name in context.reference.linears:
        rule = context.assigned[name]
        site = sites.get(name) if rule.scheme.low_precision else None
        linears.append(
            LinearReport(
                name=name,
                action=rule.action,
                granularity=rule.granularity,
                group_size=rule.group_size,
                rule=rule.label,
                reason=rule.reason,
                site=site.name if site else "",
                scaling=site.scaling if site else "",
                fold=site.fold if site else "",
                bins=site.bins if site else 0,
                error=site.error if site else None,
                sqnr=calibrated.sqnr.get(name, []),
            )
        )
    return linears
