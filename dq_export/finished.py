"""Commands on a finished export's folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

from dq_export.core.documents import printable, shown_path
from dq_export.core.progress import Advance, Progress
from dq_export.core.recipe import RecipeError
from dq_export.core.violations import nearest
from dq_export.deploy.audit import Audit
from dq_export.deploy.backends import backend_of
from dq_export.deploy.check import CanonicalError, Finding, ModelFileError, Target, check, read_model
from dq_export.deploy.onnxruntime.cpu import ORT
from dq_export.deploy.packages import require_packages
from dq_export.deploy.tensorrt.plan import PLAN
from dq_export.deploy.triton.repository import add_plan

from .finished_folder import MODEL, REPORT, FinishedFolder
from .ledger import RECIPE
from .machine import installed
from .output_folder import OutputError, locked, move
from .pipeline import run
from .preparation import Options
from .report.page import write_report
from .report.report import LatencyReport, Report
from .report.verdict import concluded, require
from .stages.bench import bench
from .stages.triton import REPOSITORY


def audit_again(out: Path) -> tuple[Audit, float]:
    """Build the engine on this machine and audit it: the audit, and the coverage that the recipe requires.

    Raises:
        OutputError: `out` is not a finished export.
        BackendError: the graph is damaged.
    """
    finished = FinishedFolder.open(out, RECIPE, MODEL, REPORT)
    recipe = finished.recipe()
    backend = backend_of(recipe) or ORT
    backend.require()
    with tempfile.TemporaryDirectory() as folder:
        built = backend.build(out / MODEL, Path(folder))  # first: it says what is wrong with a damaged file
        audit = backend.audit(built, finished.assigned())
    return audit, recipe.min_coverage


def finish(out: Path, progress: Advance) -> Report:
    """Build `out/engine` from `out/model.onnx` and audit it: where a machine without the GPU had to stop.

    Returns:
        The export's report with the new audit and verdict, which is also written.

    Raises:
        OutputError: `out` is not an export, or of a format that builds nothing.
        BackendError: the library is missing, or refuses the graph.
    """
    finished = FinishedFolder.open(out, RECIPE, MODEL, REPORT)
    recipe, report = finished.recipe(), finished.report()
    backend = backend_of(recipe)
    if backend is None:
        raise OutputError(f"{out} was exported with --format {recipe.format}, which builds no engine")
    backend.require()
    with locked(out), tempfile.TemporaryDirectory(dir=out) as folder:
        engine = Path(folder) / "engine"
        built = backend.build(out / MODEL, engine, progress)
        audit = backend.audit(built, finished.assigned())
        move(engine, out / "engine")
        plan = out / "engine" / PLAN
        if plan.is_file() and (out / REPOSITORY).is_dir():  # other repositories hold the graph itself
            add_plan(plan, out / REPOSITORY)
        versions = {**report.versions, **installed(backend.packages)}
        report = report.model_copy(update={"audit": audit, "engine": backend.title, "versions": versions})
        report = concluded(report, recipe)
        write_report(report, out)
    return report


def serve_again(out: Path, progress: Progress) -> Path:
    """Write `out/triton` from a finished export; every other stage is kept as it is.

    Raises:
        OutputError: `out` is not an export.
        RecipeError: its graph cannot be served; the message says how to export one that can.
        ModelError: the checkpoint, whose sampler is needed, is gone.
        AuditError, ParityError, NotHereError: the export does not keep what its recipe requires; the repository is written.
    """
    recipe = FinishedFolder.open(out, RECIPE, MODEL).recipe()
    if recipe.timesteps == "shared":
        raise RecipeError(
            f"{out} takes one timestep for a whole batch, so requests at different steps could not share a call; export anew: "
            f"dq-export --recipe {out / RECIPE} --timesteps per-sample --triton -o {out}-triton"
        )
    report = run(recipe.model_copy(update={"triton": True}), out, Options(overwrite=True), until="triton", progress=progress)
    require(report.verdict if report else None)
    return out / REPOSITORY


def check_file(path: Path, target: str) -> list[Finding]:
    """A verdict for every quantized operator of any ONNX file.

    Raises:
        RecipeError: an unknown target.
        OutputError: no ONNX file, or one that is damaged.
    """
    valid = list(get_args(Target))
    if target not in valid:
        raise RecipeError(f"--target '{target}': expected {', '.join(valid)}.{nearest(target, valid)}")
    try:
        return check(read_model(path), target)  # type: ignore[arg-type]
    except ModelFileError as error:
        raise OutputError(str(error)) from error
    except CanonicalError as error:
        raise OutputError(f"{shown_path(path)}: {printable(str(error))}") from error


def bench_again(out: Path, progress: Advance) -> LatencyReport:
    """Time the engine against the float graph and PyTorch.

    Raises:
        OutputError: `out` is not a finished export, or its inputs are damaged.
    """
    finished = FinishedFolder.open(out, RECIPE, MODEL, "float/model.onnx")
    recipe = finished.recipe()
    finished.calls()
    backend = backend_of(recipe) or ORT
    if not backend.runs:
        target = f" of --target {recipe.target}" if recipe.plan == "trt-rtx" else ""
        raise OutputError(f"{out}: an engine of {backend.title} runs on an NVIDIA GPU{target} only")
    require_packages(["polygraphy"], "dq-export bench")
    backend.require()
    return bench(out, backend, progress, recipe=recipe)


def read_report(out: Path) -> Report:
    """The report of a finished export.

    Raises:
        OutputError: `out` is none.
    """
    return FinishedFolder.open(out, REPORT).report()
