"""Which int8 activations ONNX Runtime turns into uint8, the only ones that its kernels on x86-64 multiply."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .gemm import readers
from .operand import Operand, attribute

MOVED = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "MaxPool")
"""Operators that ONNX Runtime swaps with a preceding DequantizeLinear."""
UNSIGNED = "uint8 with zero point 128: the same numbers"


def why_signed(operand: Operand) -> tuple[str, str] | None:
    """Why int8 codes stay int8, and the remedy; None for uint8 codes, and for int8 ones that become uint8.

    Source: the rewrite takes pairs of QuantizeLinear and DequantizeLinear with equal zero points, one reader each.
    """
    quantize, dequantize = operand.quantize, operand.dequantize
    if operand.dtype != ir.DataType.INT8:
        return None
    if quantize is None:
        return "int8 codes that are stored, as a first operand", "store uint8 with zero point 128"
    if any(len(readers(node)) > 1 for node in (dequantize, *operand.after)):
        return "an int8 activation that several operators read", UNSIGNED
    if len(readers(quantize)) > 1:
        return "an int8 QuantizeLinear that several operators read", UNSIGNED
    if operand.before:
        return f"a {operand.before[0].op_type} between an int8 QuantizeLinear and its DequantizeLinear", UNSIGNED
    if len(quantize.inputs) < 3 or quantize.inputs[2] is None:
        return "the int8 QuantizeLinear of its activation has no zero point", "write it, although it is 0"
    zeros = [zero.astype(np.int32).reshape(-1) for zero in operand.zero_points() if zero is not None]
    if not zeros or any(zero.size != 1 or zero[0] != zeros[0][0] for zero in zeros):
        return "zero points of its activation that differ or are computed", "one constant zero point"
    return None


def breaks(operand: Operand, opset: int) -> str:
    """Why ONNX Runtime's own rewrite of int8 codes to uint8 produces a graph that it then refuses; empty if it does not.

    Since opset 21, QuantizeLinear has `output_dtype`, which the rewrite does not change.
    """
    if operand.dtype != ir.DataType.INT8 or operand.quantize is None or why_signed(operand) is not None:
        return ""
    if attribute(operand.quantize, "output_dtype", 0):
        return "an int8 QuantizeLinear with both zero point and output_dtype"
    moved = [
        view.op_type
        for view in (*operand.after, *readers(operand.dequantize))
        if view.op_type in MOVED and not _requantized(view)
    ]
    return f"a {moved[0]} behind an int8 DequantizeLinear" if moved and opset >= 21 else ""


def _requantized(view: ir.Node) -> bool:
    users = readers(view)
    return bool(users) and all(user.op_type == "QuantizeLinear" for user in users)
