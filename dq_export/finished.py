"""What can be asked of a finished export's folder, without PyTorch."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import get_args

import onnx_ir as ir
from pydantic import ValidationError

from dq_export.calibration.collect import Progress as Advance
from dq_export.calibration.recipe import Recipe, RecipeError, Rule, nearest
from dq_export.deploy.backends import backend_of
from dq_export.deploy.check import Finding, Target, check
from dq_export.deploy.ort import ORT
from dq_export.deploy.triton.repository import add_plan
from dq_export.deploy.trt import PLAN
from dq_export.passes.match import linears

from .ledger import RECIPE, OutputError
from .page import write_report
from .pipeline import Progress, run
from .report import AuditReport, LatencyReport, Report
from .repository import REPOSITORY
from .speed import bench
from .verdict import audit_engine


def audit_again(out: Path) -> tuple[AuditReport, float]:
    """Build the engine on this machine and audit it: the audit, and the coverage that the recipe requires.

    Raises:
        OutputError: `out` is no finished export.
        BackendError: the graph is damaged.
    """
    _require(out, RECIPE, "model.onnx")
    recipe = _resolved(out)
    backend = backend_of(recipe) or ORT
    with tempfile.TemporaryDirectory() as folder:
        backend.build(
            out / "model.onnx", Path(folder), lambda done, total: None
        )  # first: it says what is wrong with a damaged file
        assigned = _assigned(out, recipe)
        return audit_engine(backend, out / "model.onnx", Path(folder), assigned), recipe.min_coverage


def finish(out: Path, progress: Advance) -> tuple[AuditReport, float]:
    """Build `out/engine` from `out/model.onnx` and audit it: where a machine without the GPU had to stop.

    Raises:
        OutputError: `out` is no export, or of a format that builds nothing.
        BackendError: the library is missing, or refuses the graph.
    """
    _require(out, RECIPE, "model.onnx", "report.json")
    recipe = _resolved(out)
    backend = backend_of(recipe)
    if backend is None:
        raise OutputError(f"{out} was exported with --format {recipe.format}, which builds no engine")
    with tempfile.TemporaryDirectory(dir=out) as folder:
        backend.build(out / "model.onnx", Path(folder) / "engine", progress)
        shutil.rmtree(out / "engine", ignore_errors=True)
        (Path(folder) / "engine").rename(out / "engine")
    assigned = _assigned(out, recipe)
    audit = audit_engine(backend, out / "model.onnx", out / "engine", assigned)
    write_report(_report(out).model_copy(update={"audit": audit}), out)
    if (out / REPOSITORY).exists():
        add_plan(out / "engine" / PLAN, out / REPOSITORY)
    return audit, recipe.min_coverage


def serve_again(out: Path, progress: Progress) -> Path:
    """Write `out/triton` from a finished export; every other stage is kept as it is.

    Raises:
        OutputError: `out` is no export.
        RecipeError: its graph cannot be served; the message says how to export one that can.
        ModelError: the checkpoint, whose sampler is needed, is gone.
    """
    _require(out, RECIPE, "model.onnx")
    recipe = _resolved(out)
    if recipe.timesteps == "shared":
        raise RecipeError(
            f"{out} takes one timestep for a whole batch, so requests at different steps could not share a call; export anew: "
            f"dq-export --recipe {out / RECIPE} --timesteps per-sample --triton -o {out}-triton"
        )
    run(recipe.model_copy(update={"triton": True}), out, until="triton", overwrite=True, progress=progress)
    return out / REPOSITORY


def check_file(path: Path, target: str) -> list[Finding]:
    """A verdict for every quantized GEMM of any ONNX file.

    Raises:
        RecipeError: an unknown target.
        OutputError: no ONNX file.
    """
    from google.protobuf.message import DecodeError

    valid = list(get_args(Target))
    if target not in valid:
        raise RecipeError(f"--target '{target}': expected {', '.join(valid)}.{nearest(target, valid)}")
    try:
        model = ir.load(path)
    except (OSError, ValueError, DecodeError) as error:
        raise OutputError(f"{path}: not a readable ONNX file ({str(error).splitlines()[0]})") from error
    return check(model, target)  # type: ignore[arg-type]


def bench_again(out: Path, progress: Advance) -> LatencyReport:
    """Time the engine against the float graph and PyTorch.

    Raises:
        OutputError: `out` is no finished export, or its inputs are damaged.
    """
    _require(out, RECIPE, "model.onnx", "float/model.onnx", "parity/inputs.json")
    try:
        recipe = _resolved(out)
        backend = backend_of(recipe) or ORT
        if not backend.runs:
            raise OutputError(f"{out}: an engine of --format {recipe.format} runs on an NVIDIA GPU only")
        return bench(out, backend, progress, recipe=recipe)
    except ValueError as error:
        raise OutputError(f"{out / 'parity' / 'inputs.json'}: damaged ({error}); export again") from error


def explain_linear(out: Path, name: str) -> dict[str, str]:
    """Label -> text of what was decided for a linear.

    Raises:
        OutputError: `out` is no finished export, or has no such linear.
    """
    _require(out, "report.json")
    report = _report(out)
    found = {linear.name: linear for linear in report.linears}
    if name not in found:
        raise OutputError(f"no linear '{name}' in {out}.{nearest(name, list(found))}")
    linear = found[name]
    kernels = [gemm.kernel for gemm in report.audit.gemms if gemm.name == name] if report.audit else []
    return {
        "action": linear.action,
        "rule": f"'{linear.rule}'{' (' + linear.reason + ')' if linear.reason else ''}",
        "input": linear.site or "not quantized",
        "scaling": linear.scaling or "none",
        "bins": str(linear.bins),
        "error": "not measured" if linear.error is None else f"{linear.error:.2e} of the output's power",
        "kernel": ", ".join(kernels) or "merged with an identical linear, or not built",
    }


def _resolved(out: Path) -> Recipe:
    recipe = Recipe.load(out / RECIPE)
    if not recipe.rules:
        raise RecipeError(f"recipe {out / RECIPE}: without rules, as no export writes it; was it cut short? Export again")
    return recipe


def _assigned(out: Path, recipe: Recipe) -> dict[str, Rule]:
    """The completed rule of every linear of the graph."""
    return {name: recipe.complete(recipe.decide(name)) for name in linears(ir.load(out / "model.onnx"))}


def _report(out: Path) -> Report:
    try:
        return Report.model_validate_json((out / "report.json").read_text(encoding="utf-8"))
    except ValidationError as error:
        raise OutputError(f"{out / 'report.json'}: written by another version of dq-export; export again") from error


def _require(out: Path, *names: str) -> None:
    missing = [name for name in names if not (out / name).exists()]
    if missing:
        raise OutputError(f"{out}: no {', '.join(missing)}; is it the output folder of a finished export?")
