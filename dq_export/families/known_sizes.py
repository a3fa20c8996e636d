"""Read sizes from the inputs that have them, where an exported graph computes them from a part."""

from __future__ import annotations

import onnx_ir as ir

from dq_export.passes.base import constant


def use_known_sizes(model: ir.Model) -> None:
    """8 * (the last level's rows) -> the rows of the input that has them, in place.

    The exporter computes all sizes of a UNet from the input with the smallest, a residual of its deepest level. OpenVINO 2026.4
    then computes attention wrongly: it does not see that the sizes are those of the tokens.
    """
    graph = model.graph
    places = {_text(value, axis): (value, axis) for value in reversed(graph.inputs) for axis in range(_rank(value))}
    for node in list(graph):
        text = _product(node)
        if text not in places or text is None:
            continue
        value, axis = places[text]
        bounds = {"start": axis, "end": axis + 1}
        shape = ir.node("Shape", [value], attributes=bounds, name=f"{node.name}.shape")
        size = ir.node("Squeeze", [shape.outputs[0]], name=f"{node.name}.size")
        for result, rank in ((shape.outputs[0], 1), (size.outputs[0], 0)):
            result.dtype, result.shape = ir.DataType.INT64, ir.Shape([1] * rank)
        graph.insert_before(node, [shape, size])
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, size.outputs[0])
        graph.remove(node, safe=True)


def _product(node: ir.Node) -> str | None:
    """`8*height_by_8` of a Mul by a constant; None for other nodes."""
    if node.op_type != "Mul":
        return None
    for factor, part in (node.inputs, node.inputs[::-1]):
        number = constant(factor)
        squeeze = part.producer() if part is not None else None
        length = squeeze.inputs[0] if squeeze is not None and squeeze.op_type == "Squeeze" else None
        shape = length.producer() if length is not None else None
        if number is None or number.size != 1 or shape is None or shape.op_type != "Shape":
            continue
        source, axis = shape.inputs[0], shape.attributes.get_int("start", 0)
        if source is not None and source.is_graph_input() and shape.attributes.get_int("end", -1) == axis + 1:
            return f"{int(number.item())}*{_text(source, axis)}"
    return None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0


def _text(value: ir.Value, axis: int) -> str:
    """The name of a dimension; a number for a fixed one."""
    dim = value.shape[axis] if value.shape is not None else None
    return str(dim.value if isinstance(dim, ir.SymbolicDim) else dim)
