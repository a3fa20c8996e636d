"""Compute in float16 or bfloat16 what is not quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ..base import GraphPass, PassReport, computed_initializer, like, stored
from ..sizes import MEASURES

WIDE = frozenset({"LayerNormalization"})
"""Operators that stay in float32: sums of squares over a row leave float16's range where nothing else does."""
OTHER = MEASURES | {"Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "QuantizeLinear"}
"""Operators whose result is never of their input's type."""
SMALL = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOATS = (ir.DataType.FLOAT, *SMALL)


@dataclass(frozen=True, kw_only=True)
class CastFloats(GraphPass):
    """float32 graph  ->  the same graph in `dtype`, with Casts at its edges and around what stays float32.

    Initializers are rounded once. Every QuantizeLinear, DequantizeLinear, scale and GEMM of a chain has one float type.
    The graph's inputs and outputs keep their types.

    It does not act where
        1. a node depends on no input but the timestep, the conditions and the sizes of the state, and no GEMM with a quantized
           weight lies before it: the sines of the timestep and of positions, the embedders' MLPs and the bin of the timestep
           need float32 and cost nothing,
        2. the operator is a LayerNormalization.

    Exactness: rounds every intermediate value to `dtype`: relative error 2^-11 (float16) or 2^-8 (bfloat16) each.

    Args:
        dtype: FLOAT16 or BFLOAT16.
    """

    name: ClassVar[str] = "cast_floats"
    # What they insert is float32.
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
            wanted = self.dtype if node in small else ir.DataType.FLOAT
            for index, value in enumerate(node.inputs):
                if value in types and types[value] != wanted and node.op_type != "Cast":
                    assert value is not None
                    key = (value, wanted)
                    if key not in cast:
                        cast[key] = _converted(graph, value, wanted)
                        types[cast[key]] = wanted
                    node.replace_input_with(index, cast[key])
            if node.op_type == "Cast" or not any(value in types for value in node.inputs):
                continue  # its type is in an attribute
            for output in node.outputs:
                if output in types:
                    types[output] = wanted
                    output.dtype = wanted
        for index, output in enumerate(list(graph.outputs)):
            if types.get(output) in SMALL:
                _widen_output(graph, index, output)
        kept = len([node for node in graph if node not in small])
        return PassReport(name=self.name, changed=(f"{len(small)} nodes in {self.dtype.name}, {kept} as they are",))

    def _small(self, graph: ir.Graph) -> set[ir.Node]:
        """Nodes behind the state, the graph's first input, or behind something quantized, and the scales' gathers."""
        behind: set[ir.Value] = set(graph.inputs[:1])
        found: set[ir.Node] = set()
        for node in graph:
            if node.op_type in MEASURES:
                continue
            # Also those of the text's keys and values, which depend on no state: a GEMM's two operands have one type.
            quantized = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            gathers = node.op_type == "Gather" and stored(node.inputs[0]) is not None and _feeds_scales(node)
            if quantized or gathers or any(value in behind for value in node.inputs):
                behind.update(node.outputs)
                if node.op_type not in WIDE:
                    found.add(node)
        return found


def _feeds_scales(node: ir.Node) -> bool:
    """Whether a Gather's result only goes into the quantization of activations: a scalar or a column a sample."""
    table = stored(node.inputs[0])
    return table is not None and len(table.shape) == 1 and table.dtype == ir.DataType.FLOAT


def _float_types(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """Every value that holds floats, by its type now. A value without a type has that of its node's first float input."""
    types = {value: value.dtype for value in (*graph.inputs, *graph.initializers.values()) if value.dtype in FLOATS}
    found: dict[ir.Value, ir.DataType] = {value: dtype for value, dtype in types.items() if dtype is not None}
    for node in graph:
        inherited = None if node.op_type in OTHER else next((found[v] for v in node.inputs if v in found), None)
        for output in node.outputs:
            dtype = output.dtype if output.dtype is not None else inherited
            if dtype in FLOATS:
                found[output] = dtype
    return found


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
