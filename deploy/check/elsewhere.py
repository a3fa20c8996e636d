"""QuantizeLinear and DequantizeLinear that no GEMM reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dq_export.passes.base import constant

from .gemm import Judgement, only_reader, readers
from .operand import Operand, codes_of, operand_of
from .rules_cuda import blocks
from .rules_nvidia import FIRST_TARGET, FP8, INT8, TARGETS, refused, refused_at_run_time
from .signedness import MOVED, breaks, why_signed

QLINEAR = frozenset({"Add", "Mul", "Softmax", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool", "Concat", "Where"})
"""Operators that ONNX Runtime's CPU provider computes on 8-bit codes, between DequantizeLinear and QuantizeLinear."""
MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather", "GatherElements", "Slice", "Split", "Expand", "Tile",
     "Resize", "MaxPool", "ReduceMax", "ReduceMin", "Identity"}
)  # fmt: skip
"""Operators that ONNX Runtime applies to the codes."""
MULTIPLY = frozenset(
    {
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "FusedMatMul",
        "FusedGemm",
        "FusedConv",
        "LSTM",
        "GRU",
        "RNN",
        "DeformConv",
    }
)
"""Operators that multiply matrices, for which no target has a kernel of low precision behind a DequantizeLinear."""
BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


def around(node: ir.Node, target: str, compute: Sequence[str], opset: int) -> Judgement:
    """How a target runs an operator that is not a GEMM and reads a DequantizeLinear."""
    operands = [operand for value in node.inputs if (operand := operand_of(value)) is not None]
    refusal = next((item for operand in operands if (item := _pair(operand, target, compute, opset)) is not None), None)
    if refusal is not None:
        return refusal
    if node.op_type in MULTIPLY:
        return "float", f"no kernel for {node.op_type} on codes", "its matrix products as MatMul, each between quantized operands"
    if target == "ort" and _on_codes(node, operands):
        return "low precision", "", ""
    return "float", f"{node.op_type} is not a GEMM and computes in float", "nothing, if meant so; without the pair it is faster"


def alone(node: ir.Node, target: str, compute: Sequence[str], opset: int) -> Judgement:
    """How a target runs a QuantizeLinear or DequantizeLinear that only operators on codes, or the caller, read."""
    operand = operand_of(node.outputs[0]) if node.op_type == "DequantizeLinear" else None
    if operand is not None and (refusal := _pair(operand, target, compute, opset)) is not None:
        return refusal
    if node.op_type == "QuantizeLinear" and target in ("trt", "trt-rtx"):
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if codes_of(node) not in (INT8, FP8):
            return "rejected", f"codes of {codes_of(node).name}", "use int8 or float8e4m3fn"
        if zero is not None and zero.astype(np.float32).any():
            return "rejected", "a zero point that is not 0", "int8 with zero point 0"
    return "float", f"no GEMM stands behind this {node.op_type}", "nothing, if meant so"


def _pair(operand: Operand, target: str, compute: Sequence[str], opset: int) -> Judgement | None:
    """Why a target refuses a pair at any place."""
    if target in ("trt", "trt-rtx"):
        needed = FIRST_TARGET.get(operand.dtype) if operand.dtype else None
        if needed and any(TARGETS.index(item) < TARGETS.index(needed) for item in compute):
            return "rejected", f"{operand.dtype.name if operand.dtype else ''} on {compute[0]}", f"build for {needed} or later"
        return refused(operand) or (refused_at_run_time(operand) if target == "trt" else None)
    floats = {operand.float_type, operand.source.dtype if operand.quantize is not None else operand.float_type} - {None}
    if len(floats) > 1:
        names = " and ".join(sorted(item.name for item in floats if item is not None))
        return "rejected", f"a scale and values of {names}", "one float type for x and its scale"
    if ir.DataType.BFLOAT16 in floats:
        return "rejected", "bfloat16: ONNX Runtime has no QuantizeLinear for it", "float32"
    if target == "ort-cuda" and (refusal := blocks(operand)) is not None:
        return refusal
    if target == "ort" and breaks(operand, opset):
        return (
            "rejected",
            f"{breaks(operand, opset)}: ONNX Runtime's rewrite to uint8 is not a valid graph",
            "uint8 with zero point 128",
        )
    return None


def _on_codes(node: ir.Node, operands: list[Operand]) -> bool:
    """Whether ONNX Runtime's CPU provider computes it on codes: 8-bit ones of one type in and out."""
    if node.op_type in MOVED and len(operands) == 1 and _type(operands[0]) == ir.DataType.UINT8:
        return True
    users = [only_reader(node)] if len(node.outputs) == 1 else readers(node)
    if any(user is None or user.op_type != "QuantizeLinear" for user in users) or not users:
        return False
    if any(operand.float_type == ir.DataType.FLOAT16 for operand in operands):
        return False
    inputs = 2 if node.op_type == "Where" else 1 if node.op_type in MOVES else len(node.inputs)
    if node.op_type not in QLINEAR | MOVES or len(operands) != inputs:
        return False
    types = {_type(operand) for operand in operands} | {_result_type(user) for user in users if user is not None}
    return len(types) == 1 and types <= {*BYTES}


def _type(operand: Operand) -> ir.DataType | None:
    return ir.DataType.UINT8 if operand.dtype == ir.DataType.INT8 and why_signed(operand) is None else operand.dtype


def _result_type(quantize: ir.Node) -> ir.DataType | None:
    reader = only_reader(quantize)
    operand = operand_of(reader.outputs[0]) if reader is not None and reader.op_type == "DequantizeLinear" else None
    return codes_of(quantize) if operand is None else _type(operand)
