"""Milliseconds of one linear in every quantized form, timed on the target: the table of a search by latency."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.folds import explicit
from dq_export.core.grid import cover
from dq_export.core.network import InputSite
from dq_export.core.progress import Progress
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable, TimestepBins, TokenScale
from dq_export.core.scheme import Scheme
from dq_export.deploy.backend import Backend, Built
from dq_export.deploy.latency import measure
from dq_export.passes.base import run_passes
from dq_export.passes.canonical.insert_qdq import InsertQdq
from dq_export.passes.canonical.quantize_weights import QuantizeWeights
from dq_export.passes.match import SCOPES

from ..families.reference import Float32, Reference
from .space import Space

LINEAR, STATE = "linear", "state"
RANGE = 4.0
"""The seed of the random inputs."""


def time_space(space: Space, reference: Reference, backend: Backend, watch: Progress) -> Space:
    """Return the space with the milliseconds of a network call of batch 2, from a table of kernels that is timed here."""
    start = time.monotonic()
    watch.begin("time", "kernels of every shape and choice")
    tokens = _rows(reference)
    times_of: dict[tuple[int, ...], list[float]] = {}
    milliseconds = np.full(space.allowed.shape, np.inf)
    for i, site in enumerate(space.sites):
        for name in space.linears[site]:
            weight = reference.weight(name)
            usable = np.flatnonzero(space.allowed[i])
            key = (tokens[site], *weight.shape)
            if key not in times_of:
                times_of[key] = time_choices(backend, weight, tokens[site], [space.choices[j] for j in usable])
            before = np.where(np.isinf(milliseconds[i, usable]), 0.0, milliseconds[i, usable])
            milliseconds[i, usable] = before + np.asarray(times_of[key])
        watch.advance(i + 1, len(space.sites), "inputs")
    watch.end(time.monotonic() - start, f"{len(times_of)} shapes", kept=False)
    return replace(space, time=milliseconds)


def _rows(reference: Reference) -> dict[str, int]:
    """The number of rows of each site's input in a call of batch 2."""
    rows: dict[str, int] = {}

    def watch(name: str, value: Any) -> None:
        rows[name] = len(value)

    with reference.observe(watch):
        reference.forward({item.name: item.zeros(2) for item in reference.inputs})
    return rows


def time_choices(backend: Backend, weight: Float32, rows: int, choices: list[Scheme], *, rounds: int = 15) -> list[float]:
    """Median milliseconds of `float32[1, rows, in] @ weight.T` under each scheme, by the backend, interleaved.

    Args:
        weight: float32[out, in]; its values do not matter.
    """
    with tempfile.TemporaryDirectory() as folder:
        engines: dict[str, Callable[..., Float32]] = {}
        for number, scheme in enumerate(choices):
            engines[str(number)] = backend.load(build_linear(backend, weight, rows, scheme, Path(folder) / str(number)))
        values = np.random.default_rng(0).uniform(-RANGE, RANGE, (1, rows, weight.shape[1])).astype(np.float32)
        times = measure(engines, {STATE: values, "timestep": np.asarray([1], dtype=np.int64)}, rounds=rounds)
        return [times[str(number)].median for number in range(len(choices))]


def build_linear(backend: Backend, weight: Float32, rows: int, scheme: Scheme, folder: Path) -> Built:
    """Write a graph of one linear under a scheme as the backend runs it, and build its engine.

    Args:
        weight: float32[out, in].
        rows: the number of rows of its input.
        folder: new; gets `model.onnx` and `engine/`.
    """
    folder.mkdir()
    out, width = weight.shape
    x = ir.Value(name=STATE, shape=ir.Shape([1, rows, width]), type=ir.TensorType(ir.DataType.FLOAT))
    t = ir.Value(name="timestep", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    stored = ir.Value(name="weight", const_value=ir.tensor(np.ascontiguousarray(weight.T), name="weight"))
    stored.shape, stored.dtype = ir.Shape([width, out]), ir.DataType.FLOAT
    scopes = {SCOPES: str(["", f"network.{LINEAR}", "op"])}
    gemm = ir.node("MatMul", [x, stored], name=LINEAR, metadata_props=scopes)
    gemm.outputs[0].name, gemm.outputs[0].shape = "sample", ir.Shape([1, rows, out])
    gemm.outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph([x, t], [gemm.outputs[0]], nodes=[gemm], initializers=[stored], opset_imports={"": 21}, name="linear")
    model = ir.Model(graph, ir_version=10)
    if scheme.weight is not None:
        result, assigned = _calibrated(weight, scheme), {LINEAR: Rule.of("", scheme)}
        canonical = (QuantizeWeights(result=result, assigned=assigned), InsertQdq(result=result, assigned=assigned))
        run_passes(model, (*canonical, *backend.legalise(shared=True, result=result)))
        ir.save(model, folder / "model.onnx")
        return backend.build(folder / "model.onnx", folder / "engine")
    ir.save(model, folder / "float.onnx")
    return backend.baseline(folder / "float.onnx", ir.load, folder)


def _calibrated(weight: Float32, scheme: Scheme) -> CalibrationResult:
    width, grid = weight.shape[1], cover(weight, scheme)
    activation: ScaleTable | TokenScale | None = None
    qtype = scheme.graph_type
    if qtype is not None and scheme.per_token:
        activation = TokenScale(constant=RANGE / qtype.qmax, qtype=qtype)
    elif qtype is not None:
        scale = np.asarray([RANGE / qtype.qmax] * 2, dtype=np.float32)
        activation = ScaleTable(scale=scale, bins=TimestepBins(edges=(500.0,)), qtype=qtype)
    site = InputSite(name=LINEAR, linears=(LINEAR,), fold=explicit(LINEAR, width))
    ones, zeros = np.ones(width, dtype=np.float32), np.zeros(width, dtype=np.float32)
    plan = SitePlan(site=site, method="none", in_scale=ones, in_shift=zeros, activation=activation)
    multiplier = {} if grid.multiplier is None else {LINEAR: grid.multiplier}
    return CalibrationResult(sites={LINEAR: plan}, weight_scale={LINEAR: grid.scale}, multiplier=multiplier, provenance={})
