"""Milliseconds of one linear in every quantized form, timed on the target: the table of a search by latency."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dq_export.calibration.artifacts import CalibrationResult, SitePlan
from dq_export.calibration.denoiser import InputSite
from dq_export.calibration.grid import cover
from dq_export.calibration.recipe import Rule
from dq_export.calibration.scales import ScaleTable, TimestepBins, TokenScale
from dq_export.deploy.backend import Backend, Engine
from dq_export.deploy.latency import measure
from dq_export.passes.base import run_passes
from dq_export.passes.insert_qdq import InsertQdq
from dq_export.passes.match import ROOT, SCOPES
from dq_export.passes.quantize_weights import QuantizeWeights

from .families.reference import Float32

LINEAR = "linear"
RANGE = 4.0
"""Of the random inputs."""


def time_choices(backend: Backend, weight: Float32, rows: int, choices: list[Rule], *, rounds: int = 15) -> list[float]:
    """Median milliseconds of `float32[1, rows, in] @ weight.T` under each rule, by the backend, interleaved.

    Args:
        weight: float32[out, in]; its values do not matter.
    """
    with tempfile.TemporaryDirectory() as folder:
        engines: dict[str, Callable[..., Float32]] = {}
        for number, rule in enumerate(choices):
            engines[str(number)] = _engine(backend, weight, rule, Path(folder) / str(number))
        values = np.random.default_rng(0).uniform(-RANGE, RANGE, (1, rows, weight.shape[1])).astype(np.float32)
        taken = measure(engines, {"x": values, "timestep": np.asarray([1], dtype=np.int64)}, rounds=rounds)
        return [taken[str(number)].median for number in range(len(choices))]


def _engine(backend: Backend, weight: Float32, rule: Rule, folder: Path) -> Engine:
    folder.mkdir()
    out, width = weight.shape
    x = ir.Value(name="x", shape=ir.Shape(["B", "T", width]), type=ir.TensorType(ir.DataType.FLOAT))
    t = ir.Value(name="timestep", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    stored = ir.Value(name="weight", const_value=ir.tensor(np.ascontiguousarray(weight.T), name="weight"))
    stored.shape, stored.dtype = ir.Shape([width, out]), ir.DataType.FLOAT
    scopes = {SCOPES: str(["", f"{ROOT}{LINEAR}", "op"])}
    gemm = ir.node("MatMul", [x, stored], name=LINEAR, metadata_props=scopes)
    gemm.outputs[0].name, gemm.outputs[0].shape = "y", ir.Shape(["B", "T", out])
    gemm.outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph([x, t], [gemm.outputs[0]], nodes=[gemm], initializers=[stored], opset_imports={"": 21}, name="linear")
    model = ir.Model(graph, ir_version=10)
    if rule.weight is not None:
        result, assigned = _calibrated(weight, rule), {LINEAR: rule}
        canonical = (QuantizeWeights(result=result, assigned=assigned), InsertQdq(result=result, assigned=assigned))
        run_passes(model, (*canonical, *backend.legalise(shared=True, result=result)))
    ir.save(model, folder / "model.onnx")
    return backend.load(folder / "model.onnx")


def _calibrated(weight: Float32, rule: Rule) -> CalibrationResult:
    width, qtype, grid = weight.shape[1], rule.activation, cover(weight, rule)
    activation: ScaleTable | TokenScale | None = None
    if qtype is not None and rule.granularity == "token":
        activation = TokenScale(constant=RANGE / qtype.qmax, qtype=qtype)
    elif qtype is not None:
        scale = np.asarray([RANGE / qtype.qmax] * 2, dtype=np.float32)
        activation = ScaleTable(scale=scale, bins=TimestepBins(edges=(500.0,)), qtype=qtype)
    site = InputSite(name=LINEAR, linears=(LINEAR,), fold="explicit")
    ones, zeros = np.ones(width, dtype=np.float32), np.zeros(width, dtype=np.float32)
    plan = SitePlan(site=site, method="none", in_scale=ones, in_shift=zeros, activation=activation)
    multiplier = {} if grid.multiplier is None else {LINEAR: grid.multiplier}
    return CalibrationResult(sites={LINEAR: plan}, weight_scale={LINEAR: grid.scale}, multiplier=multiplier, provenance={})
