"""The whole export: one stage after the other, each finished whole, recorded, and never done twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dq_export.calibration.group import ALONE, ProcessGroup
from dq_export.core.progress import Progress, Silent
from dq_export.core.recipe import Recipe
from dq_export.deploy.backend import NotHereError

from .collector import collector_paused, collector_spared
from .heap import return_freed_memory
from .ledger import R, claim, require_usable
from .machine import versions
from .output_folder import standing, write_bytes
from .preparation import DEFAULT, Options, prepare
from .report.assemble import assemble
from .report.page import read_picture, write_report
from .report.report import FRONT, Report
from .stages.audit import AUDIT
from .stages.bench import BENCH
from .stages.build import BUILD
from .stages.calibrate import CALIBRATE, assist
from .stages.conditions import ENCODE
from .stages.distill import DISTILL, assist_training
from .stages.float_graph import FLOAT
from .stages.layout import LAYOUT
from .stages.quantize import QUANTIZE
from .stages.reference import REFERENCE
from .stages.stage import Context, Stage
from .stages.triton import TRITON
from .stages.verify import VERIFY

STAGES: tuple[Stage[Any], ...] = (
    ENCODE,
    FLOAT,
    CALIBRATE,
    DISTILL,
    REFERENCE,
    QUANTIZE,
    BUILD,
    AUDIT,
    VERIFY,
    LAYOUT,
    TRITON,
    BENCH,
)
"""In the order in which they run."""


def run(
    recipe: Recipe,
    folder: Path,
    options: Options = DEFAULT,
    *,
    until: str = STAGES[-1].name,
    progress: Progress | None = None,
    group: ProcessGroup = ALONE,
) -> Report | None:
    """Export a model into `folder`; stages that are done already, with the same inputs, are kept.

    Args:
        until: name of the last stage to run.
        group: the processes that share the calibration and the training. The first does everything else and gets the report,
            the others None.

    Raises:
        ModelError, RecipeError, CalibrationError, GraphError, BackendError, OutputError: see each. An engine that runs in float
            or is too far from PyTorch is not an exception: the report's verdict says so.
    """
    watch = progress or Silent()
    picture = read_picture(options.front) if options.front else None
    if group.rank == 0:  # it alone holds the lock, and the others write only after it has called them
        require_usable(folder)
    watch.begin("load", recipe.model)
    start = time.monotonic()
    stages = STAGES[: [stage.name for stage in STAGES].index(until) + 1]
    with collector_paused():
        prepared = prepare(recipe, stages, options, watch, standing(folder))
    reference = prepared.reference
    watch.end(time.monotonic() - start, f"{len(reference.linears)} linears, {reference.sampler}", kept=False)
    if group.rank > 0:
        if CALIBRATE.name in prepared.stages:
            assist(prepared, folder, group, options.device)
        if DISTILL.name in prepared.stages and prepared.recipe.rounding == "distill":
            assist_training(prepared, folder, group, options.device)
        return None
    with claim(folder, prepared.recipe.dump(), overwrite=options.overwrite) as ledger:
        context = Context(
            **vars(prepared),
            folder=folder,
            ledger=ledger,
            progress=watch,
            group=group,
            device=options.device,
            plugin=options.plugin,
        )
        with collector_spared():
            run_stages(context)
        if prepared.stages[-1] != until:
            watch.begin(until, f"left out: it does not fit in {options.max_memory:g} GiB")
        report = assemble(context, options.command)
        if picture is not None:
            write_bytes(folder / FRONT, picture)
        write_report(report, folder)
    return report


def run_stages(context: Context) -> None:
    """Every stage that the run has, in order. PyTorch's weights are freed as soon as no later stage needs them."""
    loaded = True
    for stage in STAGES:
        if stage.name not in context.stages or not stage.applies(context):
            continue
        if loaded and not stage.network:
            context.reference.release()
            loaded = False
        try:
            run_stage(stage, context)
        except NotHereError as error:
            context.results.unbuilt = str(error)


def run_stage(stage: Stage[R], context: Context) -> None:
    """Do a stage, or keep what an earlier run of it left."""
    context.progress.begin(stage.name, stage.text(context))
    start = time.monotonic()
    return_freed_memory()

    def work(target: Path) -> R:
        result = stage.run(context, target)
        return result.model_copy(update={"seconds": round(time.monotonic() - start, 2)})

    inputs = {**stage.inputs(context), "versions": versions()}
    result, now = context.ledger.stage(stage.name, stage.result, inputs, stage.outputs(context), work)
    if not now:
        stage.reuse(context)
    context.results.add(stage, result)
    context.progress.end(time.monotonic() - start, result.summary, kept=not now)
