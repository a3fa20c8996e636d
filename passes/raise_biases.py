"""Biases that no runtime merges into a float GEMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from .base import GraphPass, PassReport, initializer, stored
from .match import linears


@dataclass(frozen=True, kw_only=True)
class RaiseBiases(GraphPass):
    """MatMul -> Add(b [N])  ->  MatMul -> Add(b [1, 1, N]), of linears whose weight is dequantized.

    Where all shapes are constant, as with a fixed batch, ONNX Runtime first makes a Gemm of MatMul and the Add of a vector,
    and then finds no Q/DQ that it knows around it: the engine ran in float, at a quarter of its speed. It makes no Gemm of a
    bias of more dimensions.

    It does not act where
        1. the MatMul's result has other than three or more dimensions, or an unknown number of them,
        2. the Add does not read the MatMul itself, or its other operand is not a stored vector.

    Exactness: bit-exact.
    Source: measured with ONNX Runtime 1.31; its MatMulAddFusion takes biases of one dimension, and of [1, N].
    """

    name: ClassVar[str] = "raise_biases"

    def rewrite(self, model: ir.Model) -> PassReport:
        changed = []
        for name, linear in linears(model).items():
            product, add = linear.gemm.outputs[0], linear.bias_add
            rank = len(product.shape) if product.shape is not None else 0
            if rank < 3 or add is None or product not in add.inputs or stored(linear.gemm.inputs[1]) is not None:
                continue
            bias = linear.bias()
            if bias.ndim != 1:
                continue
            whole = initializer(model.graph, f"{name}.raised_bias", bias.reshape((1,) * (rank - 1) + (-1,)))
            add.replace_input_with(0 if add.inputs[1] is product else 1, whole)
            changed.append(f"'{name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=())
