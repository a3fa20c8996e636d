"""Merge identical initializers and repeated sub-graphs; give every GEMM and convolution its module's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from ..base import GraphPass, PassReport
from ..match import convolutions, linears

FIRST = 64
"""Number of leading elements that must agree before two tensors are compared completely."""


@dataclass(frozen=True, kw_only=True)
class MergeDuplicates(GraphPass):
    """embedder(t) in every block  ->  one embedder(t) that all blocks read.

    diffusers' DiT stores one copy of the timestep and label embedder per block. Afterwards each GEMM or convolution has its
    module's name, which the report, the audit and TensorRT's layer dump use. Only tensors of one shape whose first
    elements agree are read completely.

    Exactness: bit-exact.

    It does not act on
        1. tensors that differ in a single bit,
        2. nodes that differ in an attribute.
    """

    name: ClassVar[str] = "merge_duplicates"
    # Weights are compared in the layout that the GEMMs read.
    after: ClassVar[tuple[str, ...]] = ("fold_transpose",)

    def rewrite(self, model: ir.Model) -> PassReport:
        before = len(model.graph) + len(model.graph.initializers)
        _merge_initializers(model.graph)
        CommonSubexpressionEliminationPass()(model)
        removed = before - len(model.graph) - len(model.graph.initializers)
        changed = [f"removed {removed} duplicate nodes and initializers"] if removed else []
        by_name = {node.name: node for node in model.graph}
        by_module = {name: linear.gemm for name, linear in linears(model).items()}
        by_module |= {name: node for node, name in convolutions(model).items()}
        for name, node in by_module.items():
            if node.name != name:
                if name in by_name:
                    by_name[name].name = f"{name}.renamed"
                node.name = name
                changed.append(f"named '{name}'")
        return PassReport(name=self.name, changed=tuple(changed))


def _merge_initializers(graph: ir.Graph) -> None:
    unique: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.numpy().ravel("K")[:FIRST].tobytes())
        duplicate = next((earlier for earlier in unique.get(key, ()) if _equal_bits(earlier, value)), None)
        if duplicate is None:
            unique.setdefault(key, []).append(value)
        else:
            value.replace_all_uses_with(duplicate)
            del graph.initializers[str(value.name)]


def _equal_bits(first: ir.Value, second: ir.Value) -> bool:
    assert first.const_value is not None
    assert second.const_value is not None
    return first.const_value.tobytes() == second.const_value.tobytes()
