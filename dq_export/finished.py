"""What can be asked of a finished export's folder, without PyTorch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
from pydantic import ValidationError

from dq_export.calibration.recipe import Recipe, nearest
from dq_export.deploy.backends import backend_of
from dq_export.deploy.ort import ORT
from dq_export.passes.match import linears

from .ledger import RECIPE, OutputError
from .report import AuditReport, LatencyReport, Report
from .speed import bench_all
from .verdict import audit_engine


def audit_again(out: Path) -> tuple[AuditReport, float]:
    """Build the engine on this machine and audit it: the audit, and the coverage that the recipe requires.

    Raises:
        OutputError: `out` is no finished export.
        BackendError: the graph is damaged.
    """
    _require(out, RECIPE, "model.onnx")
    recipe = Recipe.load(out / RECIPE)
    backend = backend_of(recipe) or ORT
    with tempfile.TemporaryDirectory() as folder:
        backend.build(out / "model.onnx", Path(folder))  # first: it says what is wrong with a damaged file
        assigned = {name: recipe.decide(name) for name in linears(ir.load(out / "model.onnx"))}
        return audit_engine(backend, out / "model.onnx", Path(folder), assigned), recipe.min_coverage


def bench_again(out: Path) -> LatencyReport:
    """Time the engine against the float graph and PyTorch.

    Raises:
        OutputError: `out` is no finished export, or its inputs are damaged.
    """
    _require(out, RECIPE, "model.onnx", "float/model.onnx", "parity/inputs.json")
    try:
        recipe = Recipe.load(out / RECIPE)
        return bench_all(out, backend_of(recipe) or ORT, recipe.model)
    except ValueError as error:
        raise OutputError(f"{out / 'parity' / 'inputs.json'}: damaged ({error}); export again") from error


def explain_linear(out: Path, name: str) -> dict[str, str]:
    """Label -> text of what was decided for a linear.

    Raises:
        OutputError: `out` is no finished export, or has no such linear.
    """
    _require(out, "report.json")
    try:
        report = Report.model_validate_json((out / "report.json").read_text(encoding="utf-8"))
    except ValidationError as error:
        raise OutputError(f"{out / 'report.json'}: written by another version of dq-export; export again") from error
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


def _require(out: Path, *names: str) -> None:
    missing = [name for name in names if not (out / name).exists()]
    if missing:
        raise OutputError(f"{out}: no {', '.join(missing)}; is it the output folder of a finished export?")
