"""Give biases a shape that ONNX Runtime does not merge into a float GEMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ..base import GraphPass, PassReport, reshaped_initializer, stored
from ..match import LinearNode, linears


@dataclass(frozen=True, kw_only=True)
class RaiseBiases(GraphPass):
    """MatMul -> Add(b [N])  ->  MatMul -> Add(b [1, 1, N]), for linears whose weight is dequantized.

    If all shapes are constant, for example with a fixed batch, ONNX Runtime first merges MatMul and the Add of a vector into
    a Gemm, and then does not recognize the Q/DQ around it: the engine ran in float, at a quarter of its speed. It does not
    merge a bias of more dimensions.

    It does not act where
        1. the MatMul's result has fewer than three dimensions, or an unknown number of them,
        2. the Add does not read the MatMul itself, or its other operand is not a stored vector,
        3. the weight is float, since such a linear may become a Gemm.

    Exactness: bit-exact.
    Source: measured with ONNX Runtime 1.31; its MatMulAddFusion takes biases of one dimension, and of [1, N].
    """

    name: ClassVar[str] = "raise_biases"
    # Biases of float GEMMs stay as they are.
    after: ClassVar[tuple[str, ...]] = ("quantize_weights",)

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for name, linear in linears(model).items():
            case = _refusal(linear)
            if case:
                skipped.append(f"'{name}': {case}")
                continue
            product, add, bias = linear.gemm.outputs[0], linear.bias_add, linear.bias_tensor()
            assert add is not None
            assert bias is not None
            assert product.shape is not None
            shape = (1,) * (len(product.shape) - 1) + tuple(bias.shape.numpy())
            raised = reshaped_initializer(model.graph, f"{name}.raised_bias", bias, shape)
            add.replace_input_with(0 if add.inputs[1] is product else 1, raised)
            changed.append(f"'{name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _refusal(linear: LinearNode) -> str:
    """Return the case in which the pass must not act on a linear; empty if it may act."""
    product, add = linear.gemm.outputs[0], linear.bias_add
    if product.shape is None or len(product.shape) < 3:
        return "case 1: a result of fewer than three dimensions"
    bias = linear.bias_tensor()
    if add is None or product not in add.inputs or bias is None or len(bias.shape) != 1:
        return "case 2: no Add of a stored vector to the result"
    if stored(linear.gemm.inputs[1]) is not None:
        return "case 3: a float weight"
    return ""
