"""Compute a bfloat16 graph in float32 with bfloat16's rounding, for runtimes without bfloat16 kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ..base import GraphPass, PassReport, computed_initializer, redirect, stored

MOVES = frozenset({"Concat", "Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose result holds only numbers of their input."""


@dataclass(frozen=True, kw_only=True)
class WidenFloats(GraphPass):
    """Node in bfloat16  ->  node in float32 -> Cast to bfloat16 -> Cast to float32.

    Initializers become float32 with the same numbers. The graph's inputs and outputs are already float32.

    It does not act where nothing is bfloat16.

    Exactness: each result is that of a kernel that computes in float32 and rounds once, as tensor cores do.
    """

    name: ClassVar[str] = "widen_floats"
    after: ClassVar[tuple[str, ...]] = ("cast_floats",)

    def rewrite(self, model: ir.Model) -> PassReport:
        graph = model.graph
        narrow = [value for value in graph.initializers.values() if value.dtype == ir.DataType.BFLOAT16 and value.uses()]
        nodes = [node for node in graph if any(output.dtype == ir.DataType.BFLOAT16 for output in node.outputs)]
        todo = [node for node in nodes if node.op_type != "Cast" or _rounds(node) is None]
        if not narrow and not todo:
            return PassReport(name=self.name)
        for value in narrow:
            redirect(value, _widened(graph, value))
        for node in todo:
            for output in [item for item in node.outputs if item.dtype == ir.DataType.BFLOAT16]:
                _round(graph, node, output)
        return PassReport(name=self.name, changed=(f"{len(todo)} nodes, {len(narrow)} initializers",))


def _rounds(node: ir.Node) -> ir.Node | None:
    """The Cast to float32 that is the only reader of a Cast to bfloat16, or None."""
    users = {user for user, _ in node.outputs[0].uses()}
    user = next(iter(users)) if len(users) == 1 else None
    wide = user is not None and user.op_type == "Cast" and user.attributes.get_int("to") == ir.DataType.FLOAT.value
    return user if wide else None


def _widened(graph: ir.Graph, value: ir.Value) -> ir.Value:
    tensor = stored(value)
    assert tensor is not None
    shape, dtype = tuple(tensor.shape.numpy()), ir.DataType.FLOAT
    return computed_initializer(graph, f"{value.name}.wide", dtype, shape, lambda: tensor.numpy().astype(dtype.numpy()))


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Insert the pair of Casts; a Cast to bfloat16 needs only the second, and operators of MOVES need neither."""
    users = list(output.uses())
    if node.op_type == "Cast":
        casts = [ir.node("Cast", [output], attributes={"to": ir.DataType.FLOAT.value})]
    else:
        output.dtype = ir.DataType.FLOAT
        if node.op_type in MOVES:
            return
        down = ir.node("Cast", [output], attributes={"to": ir.DataType.BFLOAT16.value})
        down.outputs[0].dtype, down.outputs[0].shape = ir.DataType.BFLOAT16, output.shape
        casts = [down, ir.node("Cast", [down.outputs[0]], attributes={"to": ir.DataType.FLOAT.value})]
    last = casts[-1].outputs[0]
    last.dtype, last.shape = ir.DataType.FLOAT, output.shape
    graph.insert_after(node, casts)
    for user, index in users:
        user.replace_input_with(index, last)
