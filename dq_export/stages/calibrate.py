"""The stage `calibrate`: scales, scalings and codes, from pictures that PyTorch samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from dq_export.calibration.collect.sampling import Sampling
from dq_export.calibration.group import ProcessGroup
from dq_export.calibration.tables import Tables
from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.condition_file import CONDITIONS
from dq_export.core.plugins import described_plugins
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable, TimestepBins, TokenScale

from ..families.reference import Reference
from ..ledger import Result
from ..machine import versions
from ..output_folder import GATHERED
from ..report.report import Part, TableReport
from .conditions import ENCODE, draws_prompts, set_conditions
from .stage import Context, Prepared, Stage

if TYPE_CHECKING:
    from dq_export.calibration.context import Calibration

CALIBRATION = "calibration.safetensors"
"""Its file in an output folder."""


class SiteResult(Part):
    """What calibration decided for one input.

    Args:
        scaling: the equivalent scaling.
        fold: what takes it up; empty where nothing is scaled.
        bins: timestep bins of its scales; 0 where the input stays float.
        error: measured noise power / signal power of the output; None where it was not measured.
    """

    name: str
    linears: tuple[str, ...]
    scaling: str
    fold: str
    bins: int = Field(ge=0)
    error: float | None


class Calibrated(Result):
    """What later stages and the report need of a calibration; the numbers themselves are in its file.

    Args:
        edges: timesteps between the coarsest bins that refine those of every table.
        timesteps: at which linears were measured.
        sqnr: by linear, dB at each of `timesteps`; None where nothing was measured.
    """

    edges: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    tables: tuple[TableReport, ...] = ()
    sites: tuple[SiteResult, ...] = ()
    sqnr: dict[str, list[float | None]] = Field(default_factory=dict)

    @property
    def bins(self) -> TimestepBins:
        """The coarsest bins that refine those of every table."""
        return TimestepBins(edges=self.edges)

    @model_validator(mode="after")
    def _has_bins(self) -> Calibrated:
        self.bins  # noqa: B018  # refuses edges that do not rise
        return self

    @staticmethod
    def of(result: CalibrationResult) -> Calibrated:
        """The part of a calibration that stays in memory."""
        plans, bins = result.sites.values(), result.bins()
        scaled = sum(plan.scaled for plan in plans)
        return Calibrated(
            summary=f"{len(plans)} inputs, {scaled} scaled, {len(bins)} timestep bins",
            edges=bins.edges,
            timesteps=result.timesteps,
            tables=tuple(_table(plan) for plan in plans),
            sites=tuple(_site(plan) for plan in plans),
            sqnr={name: _rounded(values) for name, values in result.sqnr.items()},
        )


@dataclass(frozen=True)
class Calibrate(Stage[Calibrated]):
    """Samples and decides, together with the other processes that torchrun started."""

    name: str = "calibrate"
    result: type[Calibrated] = Calibrated
    fields: tuple[str, ...] = (
        "channel_bits", "attention", "method", "bias_correction", "percentile", "bins", "scaling", "alpha", "rho", "shift",
        "calib_size", "calibration", "steps", "guidance_scale", "sizes", "seed", "tables_sha256",
    )  # fmt: skip
    needs: tuple[Stage[Any], ...] = (ENCODE,)
    network: bool = True

    def text(self, context: Context) -> str:
        """What is sampled, or that nothing is."""
        from dq_export.calibration.calibrate import samples

        recipe = context.recipe
        if not samples(recipe, context.assigned):
            return "of weights alone: nothing is sampled"
        return f"{recipe.calib_size} pictures of {recipe.steps} steps, method {recipe.method}, scaling {recipe.scaling}"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The file of scales."""
        return (CALIBRATION,)

    def also(self, context: Context) -> dict[str, Any]:
        """The checkpoint, what the rules decide, the user's own plugin, the package of another's method, and whether the
        graph's scales are float16."""
        methods = [text for text in described_plugins("methods") if text.startswith(f"{context.recipe.method} (")]
        decisive = {"model": context.reference.digest, "schemes": context.schemes, "plugin": context.plugin.name}
        rounding = context.recipe.first_rounding  # training starts from it, and leaves this stage's work as it is
        return {**decisive, "method": methods, "rounding": rounding, "half": context.recipe.dtype == "fp16"}

    def run(self, context: Context, target: Path) -> Calibrated:
        """Call the other processes to the work, calibrate, and write `calibration.safetensors`."""
        from dq_export.calibration.calibrate import calibrate

        calibration = calibration_of(context, context.folder / GATHERED)
        announce(context.group, work=True)
        with context.reference.on(context.device):
            result = calibrate(calibration)
        assert result is not None  # the first process gets it
        result.save(target / CALIBRATION)
        shutil.rmtree(calibration.folder, ignore_errors=True)  # there is none where only weights are quantized
        calibrated = Calibrated.of(result)
        summary = f"{calibrated.summary}{described(context.tables, context.assigned)}"
        return calibrated.model_copy(update={"summary": summary})

    def reuse(self, context: Context) -> None:
        """Send the other processes home."""
        announce(context.group, work=False)


CALIBRATE = Calibrate()


def announce(group: ProcessGroup, *, work: bool) -> None:
    """Tell the other processes whether there is a calibration, or a training, to share. Each of them waits for this."""
    group.largest(np.asarray([float(work)]))


def announced(group: ProcessGroup) -> bool:
    """Wait for what the first process announces."""
    return bool(group.largest(np.zeros(1)).any())


def assist(prepared: Prepared, folder: Path, group: ProcessGroup, device: str) -> None:
    """Sample this process's share of the calibration, if the first process announces one.

    Args:
        folder: the output folder, to which only the first process writes its results.
    """
    from dq_export.calibration.calibrate import calibrate

    if announced(group):
        with prepared.reference.on(device):
            calibrate(calibration_beside(prepared, folder, folder / GATHERED, group))


def calibration_beside(prepared: Prepared, folder: Path, gathered: Path, group: ProcessGroup) -> Calibration:
    """What a process that is not the first one works on.

    Args:
        folder: the output folder. gathered: for the calibration's files meanwhile.
    """
    from dq_export.calibration.context import Calibration

    reference, recipe = prepared.reference, prepared.recipe
    if draws_prompts(recipe):
        set_conditions(reference, folder / CONDITIONS)
    return Calibration(
        denoiser=reference,
        recipe=recipe,
        assigned=prepared.assigned,
        sampling=sampling_of(recipe, reference),
        folder=gathered,
        group=group,
        tables=prepared.tables,
        space=prepared.space,
    )


def described(tables: Tables, assigned: Mapping[str, Rule]) -> str:
    """What a file of tables decided, and which quantized linears it left to calibration; empty without a file."""
    if tables.file is None:
        return ""
    header = tables.file.header
    rest = [name for name, rule in assigned.items() if rule.scheme.weight and name not in header.linears]
    remark = f", calibrated: {', '.join(rest[:3])}" + (f" and {len(rest) - 3} more" if len(rest) > 3 else "") if rest else ""
    return f"; {len(header.linears)} linears as {header.method} gives them{remark}"


def calibration_of(context: Context, folder: Path) -> Calibration:
    """What a run's calibration works on; `folder`: for its files meanwhile."""
    from dq_export.calibration.context import Calibration

    recipe = context.recipe
    provenance = {"model": context.reference.digest, "sampler": context.reference.sampler, **versions()}
    provenance |= {key: str(getattr(recipe, key)) for key in ("seed", "steps", "calib_size", "guidance_scale")}
    if recipe.tables_sha256 is not None:
        provenance["tables"] = recipe.tables_sha256
    return Calibration(
        denoiser=context.reference,
        recipe=recipe,
        assigned=context.assigned,
        sampling=sampling_of(recipe, context.reference),
        folder=folder,
        provenance=provenance,
        progress=context.progress.advance,
        group=context.group,
        plugin=context.plugin,
        tables=context.tables,
        space=context.space,
    )


def sampling_of(recipe: Recipe, reference: Reference) -> Sampling:
    """Which pictures a recipe's calibration samples."""
    return Sampling(
        calib_size=recipe.calib_size,
        steps=recipe.steps,
        seed=recipe.seed,
        guidance=recipe.guidance_scale or 1.0,
        conditions=len(reference.conditions),
        batch=min(reference.batch, recipe.calib_size // max(1, len(recipe.pixels))),
        sizes=recipe.pixels,
    )


def _site(plan: SitePlan) -> SiteResult:
    return SiteResult(
        name=plan.site.name,
        linears=plan.site.linears,
        scaling=plan.method,
        fold=plan.site.target if plan.scaled else "",
        bins=len(plan.activation.bins) if plan.activation else 0,
        error=plan.error if np.isfinite(plan.error) else None,
    )


def _table(plan: SitePlan) -> TableReport:
    """A site's scales as the report shows them."""
    scale, edges, scales = plan.activation, [], []
    granularity = "float" if scale is None else "token-group" if isinstance(scale, TokenScale) and scale.group else "token"
    if isinstance(scale, ScaleTable):
        granularity, edges, scales = "tensor", list(scale.bins.edges), [float(value) for value in scale.scale]
    return TableReport(
        site=plan.site.name, granularity=granularity, edges=edges, scales=scales, alternatives=dict(plan.alternatives)
    )


def _rounded(values: npt.NDArray[np.float32]) -> list[float | None]:
    return [round(float(value), 1) if np.isfinite(value) else None for value in values]
