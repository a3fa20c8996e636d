"""Compute everything that is not quantized in float16 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ..base import GraphPass, PassReport, computed_initializer, like, stored
from ..sizes import MEASURES

WIDE = frozenset({"LayerNormalization"})
"""Operators that stay in float32: only their sums of squares over a row leave float16's range."""
OTHER = MEASURES | {"Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "QuantizeLinear"}
"""Operators whose result is never of their input's type."""
FACTORS = {("Resize", 2)}
"""Inputs, by operator and index, that ONNX takes in float32 alone."""
SMALL = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOATS = (ir.DataType.FLOAT, *SMALL)


@dataclass(frozen=True, kw_only=True)
class CastFloats(GraphPass):
    """float32 graph  ->  the same graph in `dtype`, with Casts at its edges and around nodes that stay float32.

    Initializers are rounded once. Every QuantizeLinear, DequantizeLinear, scale and GEMM of a chain has one float type.
    The graph's inputs and outputs keep their types.

    It does not act where
        1. a node depends only on the timestep, the conditions and the sizes of the state, and no GEMM with a quantized weight
           precedes it: the sines of the timestep and of positions, the embedders' MLPs and the bin of the timestep need
           float32, and their cost is negligible,
        2. the operator is a LayerNormalization,
        3. an input is the factors of a Resize.

    Exactness: rounds every intermediate value to `dtype`: relative error 2^-11 (float16) or 2^-8 (bfloat16) each.

    Args:
        dtype: FLOAT16 or BFLOAT16.
    """

    name: ClassVar[str] = "cast_floats"
    # These passes insert float32 values.
    after: ClassVar[tuple[str, ...]] = ("insert_qdq", "widen_codes", "quantize_attention", "factor_scale", "clip_codes")
    dtype: ir.DataType

    def rewrite(self, model: ir.Model) -> PassReport:
        graph = model.graph
        if any(node.op_type == "Cast" and node.attributes.get_int("to") == self.dtype.value for node in graph):
            return PassReport(name=self.name)
        types = _float_types(graph)
        small = self._small(graph)
        cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node in list(graph):
            target = self.dtype if node in small else ir.DataType.FLOAT
            for index, value in enumerate(node.inputs):
                if (node.op_type, index) in FACTORS:
                    continue
                if value in types and types[value] != target and node.op_type != "Cast":
                    assert value is not None
                    key = (value, target)
                    if key not in cast:
                        cast[key] = _converted(graph, value, target)
                        types[cast[key]] = target
                    node.replace_input_with(index, cast[key])
            if node.op_type == "Cast" or not any(value in types for value in node.inputs):
                continue  # an attribute gives its type
            for output in node.outputs:
                if output in types:
                    types[output] = target
                    output.dtype = target
        for index, output in enumerate(list(graph.outputs)):
            if types.get(output) in SMALL:
                _widen_output(graph, index, output)
        unchanged = len([node for node in graph if node not in small])
        return PassReport(name=self.name, changed=(f"{len(small)} nodes in {self.dtype.name}, {unchanged} as they are",))

    def _small(self, graph: ir.Graph) -> set[ir.Node]:
        """Nodes that depend on the state (the graph's first input) or on a quantized value, and the gathers of scales."""
        behind: set[ir.Value] = set(graph.inputs[:1])
        nodes: set[ir.Node] = set()
        for node in graph:
            if node.op_type in MEASURES:
                continue
            # Q/DQ of the text's keys and values are included, which do not depend on the state: both operands of a GEMM need
            # the same type.
            quantized = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            gathers = node.op_type == "Gather" and stored(node.inputs[0]) is not None and _feeds_scales(node)
            if quantized or gathers or any(value in behind for value in node.inputs):
                behind.update(node.outputs)
                if node.op_type not in WIDE:
                    nodes.add(node)
        return nodes


def _feeds_scales(node: ir.Node) -> bool:
    """Whether a Gather reads a table of scales, and its result is a scalar or a number for each sample."""
    table = stored(node.inputs[0])
    return table is not None and len(table.shape) == 1 and table.dtype == ir.DataType.FLOAT


def _float_types(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """The present type of every value that holds floats. A value without a type has that of its node's first float input."""
    types = {value: value.dtype for value in (*graph.inputs, *graph.initializers.values()) if value.dtype in FLOATS}
    floats: dict[ir.Value, ir.DataType] = {value: dtype for value, dtype in types.items() if dtype is not None}
    for node in graph:
        inherited = None if node.op_type in OTHER else next((floats[v] for v in node.inputs if v in floats), None)
        for output in node.outputs:
            dtype = output.dtype if output.dtype is not None else inherited
            if dtype in FLOATS:
                floats[output] = dtype
    return floats


def _converted(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    tensor = stored(value)
    if tensor is not None:
        shape = tuple(tensor.shape.numpy())
        label = "half" if dtype == ir.DataType.FLOAT16 else dtype.name.lower()
        return computed_initializer(graph, f"{value.name}.{label}", dtype, shape, lambda: tensor.numpy().astype(dtype.numpy()))
    node = ir.node("Cast", [value], attributes={"to": dtype.value})
    node.outputs[0].shape, node.outputs[0].dtype = value.shape, dtype
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.insert_after(producer, node)
    return node.outputs[0]


def _widen_output(graph: ir.Graph, index: int, output: ir.Value) -> None:
    producer = output.producer()
    assert producer is not None
    name, node = output.name, ir.node("Cast", [output], attributes={"to": ir.DataType.FLOAT.value})
    like(node.outputs[0], output)
    node.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_after(producer, node)
    output.name, node.outputs[0].name = f"{name}_narrow", name
    graph.outputs[index] = node.outputs[0]
