"""Remove nodes of an exported graph that have no effect."""

from __future__ import annotations

import onnx_ir as ir

from dq_export.passes.base import constant


def drop_idle(model: ir.Model) -> None:
    """Remove squeezes of axes that are longer than 1, and slices whose parts are concatenated again, in place."""
    for node in list(model.graph):
        if node.op_type == "Squeeze":
            _drop_squeeze(model.graph, node)
        elif node.op_type == "Concat":
            _drop_rejoined(model.graph, node)


def _drop_squeeze(graph: ir.Graph, node: ir.Node) -> None:
    """Remove Squeeze of an axis longer than 1. PyTorch leaves the axis unchanged, and ONNX does not allow it."""
    source, result = node.inputs[0], node.outputs[0]
    ranks = [len(value.shape) if value is not None and value.shape is not None else 0 for value in (source, result)]
    if source is None or ranks[0] != ranks[1] or not ranks[0] or result.is_graph_output():
        return
    _bypass(graph, node, source)


def _drop_rejoined(graph: ir.Graph, node: ir.Node) -> None:
    """Concat(x[:, :n], x[:, n:]) -> x: between blocks FLUX splits one stream into text and picture, and joins them again."""
    cuts = [value.producer() if value is not None else None for value in node.inputs]
    if len(cuts) != 2 or node.outputs[0].is_graph_output():
        return
    front, back = cuts
    if (
        front is None
        or back is None
        or front.op_type != "Slice"
        or back.op_type != "Slice"
        or front.inputs[0] is not back.inputs[0]
    ):
        return
    source, result = front.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None or len(source.shape) != len(result.shape):
        return
    axis = node.attributes.get_int("axis", 0) % len(source.shape)
    whole = _number(front, 1) == 0 and front.inputs[2] is back.inputs[1] and (_number(back, 2) or 0) >= 2**31 - 1
    if whole and all(len(cut.inputs) == 5 and _number(cut, 3) == axis and _number(cut, 4) == 1 for cut in (front, back)):
        _bypass(graph, node, source)
        for cut in (front, back):
            if not list(cut.outputs[0].uses()) and not cut.outputs[0].is_graph_output():
                graph.remove(cut, safe=True)


def _number(node: ir.Node, index: int) -> int | None:
    """The only number of a constant input; None for other inputs."""
    content = constant(node.inputs[index])
    return int(content.reshape(-1)[0]) if content is not None and content.size == 1 else None


def _bypass(graph: ir.Graph, node: ir.Node, source: ir.Value) -> None:
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, source)
    graph.remove(node, safe=True)
