"""Quantize the input of every site with its timestep-indexed scale table, in direct form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.qtypes import INT4, QuantType
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable, TimestepBins, TokenScale

from ..base import GraphError, GraphPass, PassReport, initializer, like
from ..match import LinearNode, element_type, find_linear, linears
from ..names import SITE

FAINTEST = 2.0**-13
"""The range of the smallest token that still uses all codes, relative to the constant range."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InsertQdq(GraphPass):
    """x -> MatMul  ->  x -> QuantizeLinear(s, 0) -> DequantizeLinear(s, 0) -> MatMul, with s = Gather(table, bin(timestep)).

    bin(t) counts the edges that are <= t, once for all tables: each table is resampled to the union of all bins, which
    changes no scale. With one timestep for the batch, s is a scalar. With a timestep per sample, s is [B] along axis 0,
    which is legal ONNX; backends with integer kernels need it factored. A table with one bin is a constant scale.

    A scale for each token is s = max(|x| of the token, c qmax 2^-13) clip / qmax, [B, T, 1]: blocks along the last axis, one
    per token. Only this form has no zero point, which would have to be computed as well to have the shape of s.

    It does not act where
        1. no reader of the site takes quantized activations,
        2. a reader already reads a DequantizeLinear.

    Exactness: lossy by design; each element moves by at most s / 2 unless it is clipped.
    Source: ONNX QuantizeLinear-21; per-timestep tables as DilateQuant's temporal parallel quantizer (arXiv 2409.14307).

    Args:
        result: the tables.
        assigned: the deciding rule of every linear.
        timestep: the graph input that the tables are indexed by, [1] or [B].
    """

    name: ClassVar[str] = "insert_qdq"
    # An explicit scaling must precede the QuantizeLinear, and the GEMMs must be in their final form.
    after: ClassVar[tuple[str, ...]] = ("merge_duplicates", "fold_scaling", "quantize_weights")
    result: CalibrationResult
    assigned: Mapping[str, Rule]
    timestep: str = "timestep"

    def rewrite(self, model: ir.Model) -> PassReport:
        by_name = linears(model)
        todo = [(plan, gemms) for plan in self.result.sites.values() if (gemms := self._readers(by_name, plan))]
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
            _insert(graph, plan.site.name, gemms, [scale, point], **({} if static or shared else {"axis": 0}))
            changed.append(f"'{plan.site.name}': {len(table.bins)} bins")
        return changed

    def _readers(self, by_name: Mapping[str, LinearNode], plan: SitePlan) -> list[ir.Node]:
        gemms = [find_linear(by_name, n).gemm for n in plan.site.linears if self.assigned[n].scheme.graph_type]
        return [gemm for gemm in gemms if not _dequantized(gemm.inputs[0])]


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _bin_index(graph: ir.Graph, timestep: str, bins: TimestepBins) -> tuple[ir.Value, bool]:
    """The int64 index of the bin, and whether it is a scalar: [] for a timestep input [1], otherwise [B]."""
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


def _insert(graph: ir.Graph, site: str, gemms: list[ir.Node], scales: list[ir.Value], **attributes: int) -> None:
    """Insert Q/DQ before the GEMMs.

    Args:
        scales: the scale, and the zero point unless `attributes` has the element type.
    """
    source = gemms[0].inputs[0]
    assert source is not None
    dtype = scales[1].dtype if len(scales) > 1 else ir.DataType(attributes["output_dtype"])
    assert dtype is not None
    quantize = ir.node("QuantizeLinear", [source, *scales], attributes=attributes, name=f"{site}.activation_q")
    codes = quantize.outputs[0]
    attributes.pop("output_dtype", None)
    dequantize = ir.node("DequantizeLinear", [codes, *scales], attributes=attributes, name=f"{site}.activation_dq")
    codes.dtype, codes.shape = dtype, source.shape
    like(dequantize.outputs[0], source)
    for node in (quantize, dequantize):
        SITE.write(node, site)
    graph.insert_before(gemms[0], [quantize, dequantize])
    for gemm in gemms:
        gemm.replace_input_with(0, dequantize.outputs[0])


def _insert_token(graph: ir.Graph, site: str, token: TokenScale, gemms: list[ir.Node]) -> None:
    source = gemms[0].inputs[0]
    assert source is not None
    width = source.shape[-1] if source.shape is not None else None
    if source.shape is None or not isinstance(width, int):
        raise GraphError(f"'{site}': a scale for each token needs the width of its input, found shape {source.shape}")
    qmax = np.float32(token.qtype.qmax)
    faintest = np.float32(token.constant * token.qtype.qmax) * np.float32(FAINTEST)
    axes = initializer(graph, f"{site}.token_axes", np.asarray([-1], dtype=np.int64))
    size = ir.node("Abs", [source])
    largest = ir.node("ReduceMax", [size.outputs[0], axes], attributes={"keepdims": 1})
    # A token of zeros has no range. A token far below the others is rounded as if its range were 2^-13 of theirs, which keeps
    # the factor inside float16.
    amax = ir.node("Max", [largest.outputs[0], initializer(graph, f"{site}.token_least", np.asarray(faintest))])
    unit = initializer(graph, f"{site}.token_scale", np.asarray(np.float32(token.clip) / qmax))
    scale = ir.node("Mul", [amax.outputs[0], unit])
    like(size.outputs[0], source)
    for node in (largest, amax, scale):
        like(node.outputs[0], source)
        node.outputs[0].shape = ir.Shape([*source.shape[:-1], 1])
    graph.insert_before(gemms[0], [size, largest, amax, scale])
    dtype, last = _stored_type(token.qtype), len(source.shape) - 1
    _insert(graph, site, gemms, [scale.outputs[0]], axis=last, block_size=width, output_dtype=dtype.value)


def _stored_type(qtype: QuantType) -> ir.DataType:
    """ONNX's element type for codes of an activation: int4 codes are stored as int8, which integer GEMMs take."""
    return ir.DataType.INT8 if qtype == INT4 else element_type(qtype)


def _prepend(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = next(iter(graph))
    graph.insert_before(first, nodes)
