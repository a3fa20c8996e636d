"""Store tables of embeddings as 8-bit codes, of which the rows that are looked up become numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.grid import WeightGrid

from ..base import GraphPass, PassReport, computed_initializer, initializer, like, redirect, stored

TOGETHER = 4096
"""Rows that are rounded at once: a vocabulary of T5-XXL takes half a gigabyte, and rounding several times that."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizeEmbeddings(GraphPass):
    """Gather(W, ids)  ->  DequantizeLinear(Gather(codes, ids), Gather(scale, ids)).

    Codes int8[V, K], scale float32[V, K / block]. No runtime has to fuse this: the rows of a prompt alone are dequantized.

    It does not act on
        1. tables without a grid.

    Exactness: each number moves by at most scale / 2.

    Args:
        grids: by name of the table's initializer, the grid of its rows, in blocks.
    """

    name: ClassVar[str] = "quantize_embeddings"
    grids: Mapping[str, WeightGrid]

    def rewrite(self, model: ir.Model) -> PassReport:
        changed = []
        for node in list(model.graph):
            table = node.inputs[0] if node.op_type == "Gather" else None
            tensor, grid = stored(table), self.grids.get(str(table.name)) if table is not None else None
            if tensor is not None and grid is not None:
                _quantize(model.graph, node, tensor, grid)
                changed.append(f"'{node.name}'")
        return PassReport(name=self.name, changed=tuple(changed))


def _quantize(graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol, grid: WeightGrid) -> None:
    rows, width = tensor.shape.numpy()

    def compute() -> npt.NDArray[np.int8]:
        table, parts = tensor.numpy(), np.array_split(np.arange(rows), math.ceil(rows / TOGETHER))
        return np.concatenate([grid.of_rows(part).codes(table[part]).astype(np.int8) for part in parts])

    ids, result = node.inputs[1], node.outputs[0]
    codes = computed_initializer(graph, f"{tensor.name}_codes", ir.DataType.INT8, (rows, width), compute)
    scale = initializer(graph, f"{tensor.name}_scale", grid.scale.T)
    looked_up = [
        ir.node("Gather", [value, ids], attributes={"axis": 0}, name=f"{node.name}.{kind}")
        for value, kind in ((codes, "codes"), (scale, "scale"))
    ]
    looked_up[0].outputs[0].dtype, looked_up[1].outputs[0].dtype = ir.DataType.INT8, ir.DataType.FLOAT
    axis = len(result.shape) - 1 if result.shape is not None else -1
    attributes = {"axis": axis, "block_size": width // grid.blocks}
    number = ir.node("DequantizeLinear", [item.outputs[0] for item in looked_up], attributes=attributes, name=f"{node.name}.dq")
    like(number.outputs[0], result)
    graph.insert_before(node, [*looked_up, number])
    redirect(result, number.outputs[0])
    graph.remove(node, safe=True)
