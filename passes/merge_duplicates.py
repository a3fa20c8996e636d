"""Merge identical initializers and repeated sub-graphs; give every linear's GEMM its module's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateHashedInitializersPass

from .base import GraphPass, PassReport
from .match import linears


@dataclass(frozen=True, kw_only=True)
class MergeDuplicates(GraphPass):
    """embedder(t) in every block  ->  one embedder(t) that all blocks read.

    diffusers' DiT stores one copy of the timestep and label embedder per block. Merging is onnx_ir's own; what is ours
    is that each linear's GEMM then bears its module's name, by which the report, the audit and TensorRT's layer dump
    know it. Exactness: bit-exact.

    It does not act on
        1. tensors that differ in a single bit,
        2. nodes that differ in an attribute.
    """

    name: ClassVar[str] = "merge_duplicates"

    def rewrite(self, model: ir.Model) -> PassReport:
        before = len(model.graph) + len(model.graph.initializers)
        DeduplicateHashedInitializersPass()(model)
        CommonSubexpressionEliminationPass()(model)
        removed = before - len(model.graph) - len(model.graph.initializers)
        changed = [f"removed {removed} duplicate nodes and initializers"] if removed else []
        taken = {node.name: node for node in model.graph}
        for name, linear in linears(model).items():
            if linear.gemm.name != name:
                if name in taken:
                    taken[name].name = f"{name}.renamed"
                linear.gemm.name = name
                changed.append(f"named '{name}'")
        return PassReport(name=self.name, changed=tuple(changed))
