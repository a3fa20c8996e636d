"""Quantized GEMMs that ONNX Runtime refuses, on the CPU and on a GPU: when it loads the file, or when it runs."""

from __future__ import annotations

import onnx_ir as ir

from .gemm import Gemm, Judgement
from .operand import shape_of


def loads(gemm: Gemm) -> Judgement | None:
    """Forms that ONNX Runtime refuses when it loads the file."""
    types = set()
    for value, operand in zip(gemm.node.inputs[:2], (gemm.left, gemm.right), strict=True):
        if operand is None:
            types |= {value.dtype} if value is not None else set()
            continue
        scale = operand.dequantize.inputs[1]
        of_operand = {operand.float_type, scale.dtype if scale is not None else None}
        of_operand |= {operand.source.dtype} if operand.quantize is not None else set()
        names = sorted(dtype.name for dtype in of_operand if dtype is not None)
        if len(names) > 1:
            return "rejected", f"a scale and values of {' and '.join(names)}", "one float type for x and its scale"
        if "BFLOAT16" in names:
            return "rejected", "bfloat16: ONNX Runtime has no QuantizeLinear for it", "float32"
        if operand.dtype == ir.DataType.FLOAT4E2M1:
            return "rejected", "float4: ONNX Runtime has no DequantizeLinear for it", "int4 blocks"
        types |= {operand.float_type} if not any(view.op_type == "Cast" for view in operand.after) else set()
    names = sorted(dtype.name for dtype in types if dtype is not None)
    return ("rejected", f"operands of {' and '.join(names)}", "one float type for both operands") if len(names) > 1 else None


def counts(gemm: Gemm) -> Judgement | None:
    """Scales that do not fit the codes: the kernel fails when it runs."""
    for operand in gemm.operands:
        codes, scale = operand.dequantize.inputs[0], operand.scale
        shape = shape_of(codes) if codes is not None else ()
        if (
            not operand.blocked
            and operand.axis < len(shape)
            and operand.scales not in (1, None, shape[operand.axis] or operand.scales)
        ):
            return (
                "rejected",
                f"{operand.scales} scales for {shape[operand.axis]} channels",
                "one scale for each index of the axis",
            )
        divided = zip(scale.shape, shape, strict=False) if operand.blocked and scale is not None else ()
        if any(size != whole for index, (size, whole) in enumerate(divided) if index != operand.axis):
            return "rejected", "blocks along more than one axis", "only the axis of the blocks is divided"
    return None
