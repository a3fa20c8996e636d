"""Quantize the input of every site with its timestep-indexed scale table, in direct form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.qtypes import QuantType
from dq_export.core.recipe import Rule
from dq_export.core.scales import ScaleTable, TimestepBins, TokenScale

from ..base import GraphError, GraphPass, PassReport, initializer, like, redirect
from ..match import STAMP_FACTOR, LinearNode, element_type, find_linear, linears

FAINTEST = 2.0**-13
"""Of the constant range: the least token that still takes all codes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InsertQdq(GraphPass):
    """x -> MatMul  ->  x -> QuantizeLinear(s, 0) -> DequantizeLinear(s, 0) -> MatMul, with s = Gather(table, bin(timestep)).

    bin(t) counts the edges that are <= t, once for all tables: each is resampled to the union of all bins, which
    changes no scale. With one timestep for the batch, s is a scalar. With a timestep per sample s is [B] along axis 0,
    which is legal ONNX; backends with integer kernels need it factored. A table with one bin is a constant scale.

    A scale for each token is factored at once, as nothing else has a kernel, and with it the codes of a table:
    a = max(|x| of the token, c qmax 2^-13) clip;  x * (c qmax / a) -> Q(c) -> DQ(c) -> MatMul -> * (a / (c qmax)).

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
        tables = [(plan, table, gemms) for plan, gemms in todo if isinstance(table := plan.activation, ScaleTable)]
        changed = []
        if tables:
            changed += self._insert_tables(graph, tables)
        for plan, gemms in todo:
            if isinstance(plan.activation, TokenScale):
                _insert_token(graph, plan.site.name, plan.activation, gemms)
                changed.append(f"'{plan.site.name}': a scale for each token")
        return PassReport(name=self.name, changed=tuple(changed))

    def _insert_tables(self, graph: ir.Graph, tables: Sequence[tuple[SitePlan, ScaleTable, list[ir.Node]]]) -> list[str]:
        bins = self.result.bins()
        index, shared = _bin_index(graph, self.timestep, bins)
        points = {}
        for dtype in dict.fromkeys(_stored_type(table.qtype) for _, table, _ in tables):
            zero = initializer(graph, "activation_zero_point", np.asarray(0, dtype=dtype.numpy()))
            zeros = zero if shared else _gather(graph, "activation_zero_points", np.zeros(len(bins), dtype=dtype.numpy()), index)
            points[dtype] = (zero, zeros)
        changed = []
        for plan, table, gemms in tables:
            static = len(table.bins) == 1
            label = f"{plan.site.name}.activation_scale"
            if static:
                scale = initializer(graph, label, table.scale.reshape(()))
            else:
                scale = _gather(graph, label, table.resample(bins).scale, index)
            point = points[_stored_type(table.qtype)][0 if static else 1]
            source = gemms[0].inputs[0]
            assert source is not None
            _insert(graph, plan.site.name, source, gemms, scale, point, axis=None if static or shared else 0)
            changed.append(f"'{plan.site.name}': {len(table.bins)} bins")
        return changed

    def _readers(self, found: Mapping[str, LinearNode], plan: SitePlan) -> list[ir.Node]:
        gemms = [find_linear(found, n).gemm for n in plan.site.linears if self.assigned[n].scheme.graph_type]
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


def _insert(
    graph: ir.Graph, name: str, source: ir.Value, gemms: list[ir.Node], scale: ir.Value, zero: ir.Value, *, axis: int | None
) -> None:
    attributes = {} if axis is None else {"axis": axis}
    quantize = ir.node("QuantizeLinear", [source, scale, zero], attributes=attributes, name=f"{name}.activation_q")
    dequantize = ir.node(
        "DequantizeLinear", [quantize.outputs[0], scale, zero], attributes=attributes, name=f"{name}.activation_dq"
    )
    like(quantize.outputs[0], zero)
    quantize.outputs[0].shape = source.shape
    like(dequantize.outputs[0], source)
    graph.insert_before(gemms[0], [quantize, dequantize])
    for gemm in gemms:
        gemm.replace_input_with(0, dequantize.outputs[0])


def _insert_token(graph: ir.Graph, name: str, token: TokenScale, gemms: list[ir.Node]) -> None:
    source = gemms[0].inputs[0]
    assert source is not None
    most = np.float32(token.constant * token.qtype.qmax)

    def number(label: str, value: float | np.float32) -> ir.Value:
        return initializer(graph, f"{name}.{label}", np.asarray(value, dtype=np.float32))

    axes = initializer(graph, f"{name}.token_axes", np.asarray([-1], dtype=np.int64))
    size = ir.node("Abs", [source])
    largest = ir.node("ReduceMax", [size.outputs[0], axes], attributes={"keepdims": 1})
    # A token of zeros has no range; one of far less than the others' is rounded as if it had 2^-13 of theirs, which keeps
    # the factor inside float16.
    amax = ir.node("Max", [largest.outputs[0], number("token_least", most * np.float32(FAINTEST))])
    before = ir.node("Div", [number("token_range", most / np.float32(token.clip)), amax.outputs[0]])
    after = ir.node("Mul", [amax.outputs[0], number("token_unit", np.float32(token.clip) / most)])
    scaled = ir.node("Mul", [source, before.outputs[0]])
    for node in (size, scaled):
        like(node.outputs[0], source)
    shape = ir.Shape([*source.shape[:-1], 1]) if source.shape is not None else None
    for node in (largest, amax, before, after):
        like(node.outputs[0], source)
        node.outputs[0].shape = shape
    graph.insert_before(gemms[0], [size, largest, amax, before, after, scaled])
    zero = initializer(graph, f"{name}.token_zero_point", np.asarray(0, dtype=_stored_type(token.qtype).numpy()))
    _insert(graph, name, scaled.outputs[0], gemms, number("token_scale", token.constant), zero, axis=None)
    for gemm in gemms:
        result = gemm.outputs[0]
        restored = ir.node("Mul", [result, after.outputs[0]], metadata_props={STAMP_FACTOR: str(gemm.name)})
        like(restored.outputs[0], result)
        graph.insert_after(gemm, restored)
        redirect(result, restored.outputs[0])


def _stored_type(qtype: QuantType) -> ir.DataType:
    """Integer activations are stored as int8, whatever their bits."""
    return element_type(qtype) if qtype.mantissa else ir.DataType.INT8


def _prepend(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = next(iter(graph))
    graph.insert_before(first, nodes)
