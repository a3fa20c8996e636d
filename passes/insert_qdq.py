"""Quantize the input of every site with its timestep-indexed scale table, in direct form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.calibration.artifacts import CalibrationResult, SitePlan
from dq_export.calibration.recipe import Rule
from dq_export.calibration.scales import TimestepBins

from .base import GraphError, GraphPass, PassReport, initializer, like
from .match import LinearNode, element_type, find_linear, linears


@dataclass(frozen=True, kw_only=True, eq=False)
class InsertQdq(GraphPass):
    """x -> MatMul  ->  x -> QuantizeLinear(s, 0) -> DequantizeLinear(s, 0) -> MatMul, with s = Gather(table, bin(timestep)).

    bin(t) counts the edges that are <= t, once for all tables: each is resampled to the union of all bins, which
    changes no scale. With one timestep for the batch, s is a scalar. With a timestep per sample s is [B] along axis 0,
    which is legal ONNX; backends with integer kernels need it factored. A table with one bin is a constant scale.

    It does not act where
        1. no reader of the site takes quantized activations,
        2. a reader reads a DequantizeLinear already.

    Exactness: lossy by design; each element moves by at most s / 2 unless it is clipped.
    Source: ONNX QuantizeLinear-21; per-timestep tables as DilateQuant's temporal parallel quantizer (arXiv 2409.14307).

    Args:
        result: the tables.
        assigned: the deciding rule of every linear.
        timestep: the graph input that the tables are indexed by, [1] or [B].
    """

    name: ClassVar[str] = "insert_qdq"
    result: CalibrationResult
    assigned: Mapping[str, Rule]
    timestep: str = "timestep"

    def rewrite(self, model: ir.Model) -> PassReport:
        found = linears(model)
        todo = [(plan, gemms) for plan in self.result.sites.values() if (gemms := self._readers(found, plan))]
        if not todo:
            return PassReport(name=self.name)
        graph = model.graph
        bins = self.result.bins()
        index, shared = _bin_index(graph, self.timestep, bins)
        points = {}
        for qtype in dict.fromkeys(plan.activation.qtype for plan, _ in todo):
            dtype = element_type(qtype).numpy()
            zero = initializer(graph, "activation_zero_point", np.asarray(0, dtype=dtype))
            zeros = zero if shared else _gather(graph, "activation_zero_points", np.zeros(len(bins), dtype=dtype), index)
            points[qtype] = (zero, zeros)
        changed = []
        for plan, gemms in todo:
            table = plan.activation
            static = len(table.bins) == 1
            label = f"{plan.site.name}.activation_scale"
            if static:
                scale = initializer(graph, label, table.scale.reshape(()))
            else:
                scale = _gather(graph, label, table.resample(bins).scale, index)
            point = points[table.qtype][0 if static else 1]
            _insert(model, plan, gemms, scale, point, axis=None if static or shared else 0)
            changed.append(f"'{plan.site.name}': {len(table.bins)} bins")
        return PassReport(name=self.name, changed=tuple(changed))

    def _readers(self, found: Mapping[str, LinearNode], plan: SitePlan) -> list[ir.Node]:
        gemms = [find_linear(found, n).gemm for n in plan.site.linears if self.assigned[n].activation]
        return [gemm for gemm in gemms if not _dequantized(gemm.inputs[0])]


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _bin_index(graph: ir.Graph, timestep: str, bins: TimestepBins) -> tuple[ir.Value, bool]:
    """int64 index of the bin, and whether it is a scalar: [] for a timestep input [1], else [B]."""
    source = next((value for value in graph.inputs if value.name == timestep), None)
    if source is None or source.shape is None or len(source.shape) != 1:
        raise GraphError(f"expected a graph input '{timestep}' of rank 1, found {[str(v) for v in graph.inputs]}")
    shared = source.shape[0] == 1
    edges = initializer(graph, "timestep_edges", np.asarray(bins.edges, dtype=np.float32))
    last = initializer(graph, "timestep_axis", np.asarray([1], dtype=np.int64))
    cast = ir.node("Cast", [source], attributes={"to": ir.DataType.FLOAT.value})
    column = ir.node("Unsqueeze", [cast.outputs[0], last])
    reached = ir.node("GreaterOrEqual", [column.outputs[0], edges])
    counted = ir.node("Cast", [reached.outputs[0]], attributes={"to": ir.DataType.INT64.value})
    index = ir.node("ReduceSum", [counted.outputs[0], last], attributes={"keepdims": 0})
    nodes = [cast, column, reached, counted, index]
    if shared:
        nodes.append(ir.node("Squeeze", [index.outputs[0]]))
    nodes[-1].outputs[0].name = "timestep_bin"
    nodes[-1].outputs[0].dtype = ir.DataType.INT64
    nodes[-1].outputs[0].shape = ir.Shape([] if shared else source.shape)
    _prepend(graph, nodes)
    return nodes[-1].outputs[0], shared


def _gather(graph: ir.Graph, name: str, table: npt.NDArray[np.generic], index: ir.Value) -> ir.Value:
    stored = initializer(graph, f"{name}_table", table)
    node = ir.node("Gather", [stored, index], attributes={"axis": 0}, name=name)
    node.outputs[0].name = name
    like(node.outputs[0], stored)
    node.outputs[0].shape = index.shape
    producer = index.producer()
    assert producer is not None
    graph.insert_after(producer, node)
    return node.outputs[0]


def _insert(model: ir.Model, plan: SitePlan, gemms: list[ir.Node], scale: ir.Value, zero: ir.Value, *, axis: int | None) -> None:
    source = gemms[0].inputs[0]
    assert source is not None
    attributes = {} if axis is None else {"axis": axis}
    name = plan.site.name
    quantize = ir.node("QuantizeLinear", [source, scale, zero], attributes=attributes, name=f"{name}.activation_q")
    dequantize = ir.node(
        "DequantizeLinear", [quantize.outputs[0], scale, zero], attributes=attributes, name=f"{name}.activation_dq"
    )
    like(quantize.outputs[0], zero)
    quantize.outputs[0].shape = source.shape
    like(dequantize.outputs[0], source)
    model.graph.insert_before(gemms[0], [quantize, dequantize])
    for gemm in gemms:
        gemm.replace_input_with(0, dequantize.outputs[0])


def _prepend(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = next(iter(graph))
    graph.insert_before(first, nodes)
