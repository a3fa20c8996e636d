"""Store weights transposed, instead of transposing them at every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ..base import GraphPass, PassReport, computed_initializer, stored


@dataclass(frozen=True, kw_only=True)
class FoldTranspose(GraphPass):
    """MatMul(x, Transpose(W))  ->  MatMul(x, W^T), where W^T is an initializer.

    The exported float graph keeps torch's layout, so that its weights can be the checkpoint's own bytes.

    It does not act where
        1. the transposed value is not an initializer with two axes.

    Exactness: bit-exact.
    """

    name: ClassVar[str] = "fold_transpose"

    def rewrite(self, model: ir.Model) -> PassReport:
        changed = []
        for node in [node for node in model.graph if node.op_type == "Transpose"]:
            tensor = stored(node.inputs[0])
            if tensor is None or len(tensor.shape) != 2:
                continue
            _fold(model.graph, node, tensor)
            changed.append(f"'{node.name}'")
        return PassReport(name=self.name, changed=tuple(changed))


def _fold(graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    first, second = tensor.shape.numpy()
    transposed = computed_initializer(graph, str(node.name), tensor.dtype, (second, first), lambda: tensor.numpy().T)
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, transposed)
    graph.remove(node, safe=True)
