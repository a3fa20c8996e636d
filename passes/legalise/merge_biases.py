"""Biases inside ONNX Runtime's integer GEMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ..base import GraphPass, PassReport, like, redirect, stored
from ..match import INTEGER_GEMM, LinearNode, linears, weight_codes

DOMAIN = "com.microsoft"
BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True, kw_only=True)
class MergeBiases(GraphPass):
    """DQ(x), DQ(W) -> MatMul -> Add(b [N])  ->  MatMulIntegerToFloat(x, W, scales, zero points, b).

    ONNX Runtime makes the same operator of the MatMul by itself, but leaves the Add, which reads and writes the whole result
    once more: 3 % of a call of PixArt at 512 pixels.

    It does not act where
        1. an operand is no DequantizeLinear of codes of 8 bits, or the weight's are not stored,
        2. the activation has several scales, or the weight has anything but one scale a tensor or an output channel,
        3. no Add of a stored vector reads the MatMul alone.

    Exactness: the same operations in the same order; the kernel may round a product and the bias once, not twice.
    Source: ONNX Runtime's contrib operators; in every version from 1.9 on.
    """

    name: ClassVar[str] = "merge_biases"
    # Types of codes and sources of attention are what they will be.
    after: ClassVar[tuple[str, ...]] = ("unsign_codes", "fuse_attention", "trim_text")

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for name, linear in linears(model).items():
            if linear.gemm.op_type == INTEGER_GEMM:
                continue
            case = _refusal(linear)
            if case:
                skipped.append(f"'{name}': {case}")
                continue
            _merge(model.graph, linear)
            changed.append(f"'{name}'")
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _refusal(linear: LinearNode) -> str:
    """The case in which the pass must not act on a linear; empty where it may."""
    left, right = (value.producer() if value is not None else None for value in linear.gemm.inputs[:2])
    for operand in (left, right):
        codes = operand.inputs[0] if operand is not None and operand.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype not in BYTES:
            return "case 1: an operand that is not dequantized from 8 bits"
    assert left is not None
    assert right is not None
    if linear.gemm.op_type != "MatMul" or weight_codes(right.inputs[0]) is None:
        return "case 1: no MatMul with a stored weight"
    if _sizes(left.inputs[1]) not in ((), (1,)) or not _by_output(right):
        return "case 2: scales that the operator does not take"
    add, bias = linear.bias_add, linear.bias_tensor()
    if add is None or linear.gemm.outputs[0] not in add.inputs or bias is None or len(bias.shape) != 1:
        return "case 3: no Add of a stored vector to the result"
    return ""


def _sizes(value: ir.Value | None) -> tuple[object, ...] | None:
    return None if value is None or value.shape is None else tuple(value.shape)


def _by_output(dequantize: ir.Node) -> bool:
    """Whether a weight [K, N] has one scale, or one for each of its N columns."""
    codes, sizes = _sizes(dequantize.inputs[0]), _sizes(dequantize.inputs[1])
    columns = codes is not None and sizes == codes[1:] and dequantize.attributes.get_int("axis", 1) in (1, -1)
    return (sizes == () or columns) and dequantize.attributes.get_int("block_size", 0) == 0


def _merge(graph: ir.Graph, linear: LinearNode) -> None:
    gemm, add = linear.gemm, linear.bias_add
    assert add is not None
    operands = [value.producer() for value in gemm.inputs if value is not None]
    left, right = (node for node in operands if node is not None)
    bias = next(value for value in add.inputs if stored(value) is not None)
    zeros = [node.inputs[2] if len(node.inputs) > 2 else None for node in (left, right)]
    inputs = [left.inputs[0], right.inputs[0], left.inputs[1], right.inputs[1], *zeros, bias]
    node = ir.node(INTEGER_GEMM, inputs, domain=DOMAIN, version=1, name=gemm.name, metadata_props=dict(gemm.metadata_props))
    result = add.outputs[0]
    like(node.outputs[0], result)
    graph.insert_before(add, node)
    redirect(result, node.outputs[0])
    # The operator keeps the MatMul's name, by which an audit finds it.
    graph.remove([add, gemm], safe=True)
