"""Give weight-only modulation linears a rank-3 input, so that runtimes do not turn them into a float Gemm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dq_export.core.rule import Rule

from ..base import GraphPass, PassReport, computed_initializer, initializer, like, redirect
from ..match import LinearNode, linears, only_user


@dataclass(frozen=True, kw_only=True, eq=False)
class LiftModulation(GraphPass):
    """Two rewrites of a linear that works on one row per sample, c[B, K]:

        Gemm -> Split -> Unsqueeze    becomes    Unsqueeze -> MatMul[B, 1, N] -> Add -> Split (chunks [B, 1, D])
        Gemm with other readers       becomes    Unsqueeze -> MatMul[B, 1, N] -> Add -> Squeeze

    ONNX Runtime fuses a 2-D MatMul and Add into Gemm before it looks at Q/DQ, and a Gemm with a dequantized weight runs
    DequantizeLinear at every call. At rank 3 it stays a MatMul, which becomes MatMulNBits.

    It does not act where
        1. the linear is not weight-only in the recipe.

    Exactness: bit-exact in real arithmetic; the runtime may choose another float kernel.

    Args:
        assigned: the deciding rule of every linear.
    """

    name: ClassVar[str] = "lift_modulation"
    # Pass fold_scaling expects the Gemm and the Split as they were exported; only a MatMul is quantized.
    after: ClassVar[tuple[str, ...]] = ("fold_scaling",)
    before: ClassVar[tuple[str, ...]] = ("quantize_weights",)
    assigned: Mapping[str, Rule]

    def rewrite(self, model: ir.Model) -> PassReport:
        changed = []
        for name, linear in linears(model).items():
            if linear.gemm.op_type != "Gemm" or not self.assigned[name].scheme.for_memory:
                continue
            split = only_user(linear.output)
            axis = initializer(model.graph, f"{name}.token_axis", np.asarray([1], dtype=np.int64))
            lifted = _lift(model.graph, linear, axis)
            if split is not None and split.op_type == "Split" and all(_unsqueezed(chunk) for chunk in split.outputs):
                _split(model.graph, linear, split, lifted)
            else:
                _squeeze(model.graph, linear, lifted, axis)
            model.graph.remove(linear.gemm, safe=True)
            changed.append(f"'{name}'")
        return PassReport(name=self.name, changed=tuple(changed))


def _unsqueezed(chunk: ir.Value) -> bool:
    return all(user.op_type == "Unsqueeze" for user, _ in chunk.uses())


def _lift(graph: ir.Graph, linear: LinearNode, axis: ir.Value) -> ir.Value:
    """Insert the linear at rank 3 before its Gemm, and return its result [B, 1, N]."""
    name, gemm = linear.name, linear.gemm
    reader, (width, depth) = linear.weight_reader(), linear.shape
    weight = computed_initializer(graph, f"{name}.weight", ir.DataType.FLOAT, (depth, width), lambda: reader().T)
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else initializer(graph, f"{name}.bias", np.zeros(width, dtype=np.float32))
    unsqueeze = ir.node("Unsqueeze", [linear.input, axis])
    matmul = ir.node("MatMul", [unsqueeze.outputs[0], weight], metadata_props=dict(gemm.metadata_props))
    add = ir.node("Add", [matmul.outputs[0], bias], metadata_props=dict(gemm.metadata_props))
    graph.insert_before(gemm, [unsqueeze, matmul, add])
    matmul.name = name
    return add.outputs[0]


def _split(graph: ir.Graph, linear: LinearNode, split: ir.Node, lifted: ir.Value) -> None:
    """Split the lifted result instead of the Gemm's; the chunks need no Unsqueeze."""
    sizes = split.inputs[1:]
    number = {} if sizes else {"num_outputs": len(split.outputs)}
    chunks = ir.node("Split", [lifted, *sizes], attributes={"axis": 2, **number}, num_outputs=len(split.outputs))
    graph.insert_before(linear.gemm, chunks)
    for old, new in zip(split.outputs, chunks.outputs, strict=True):
        for unsqueeze, _ in list(old.uses()):
            result = unsqueeze.outputs[0]
            like(new, result)
            for user, index in list(result.uses()):
                user.replace_input_with(index, new)
    for unsqueeze in [user for old in split.outputs for user, _ in list(old.uses())]:
        graph.remove(unsqueeze, safe=True)
    graph.remove(split, safe=True)


def _squeeze(graph: ir.Graph, linear: LinearNode, lifted: ir.Value, axis: ir.Value) -> None:
    """Make the readers of the Gemm read the lifted result at rank 2."""
    squeeze = ir.node("Squeeze", [lifted, axis])
    graph.insert_before(linear.gemm, squeeze)
    like(squeeze.outputs[0], linear.output)
    redirect(linear.output, squeeze.outputs[0])
