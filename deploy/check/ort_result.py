"""The operators after a GEMM, on which an integer kernel of ONNX Runtime's CPU provider also depends."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dq_export.passes.base import constant

from .gemm import Gemm, Judgement, only_reader, readers
from .operand import Operand, codes_of, operand_of, shape_of
from .signedness import UNSIGNED, why_signed

BOUNDS = {ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255)}
CLIPS = ("Relu", "Clip")


def becomes_gemm(gemm: Gemm) -> ir.Node | None:
    """The Add that ONNX Runtime joins with a MatMul to a Gemm before it looks for quantized operands; None without one."""
    node, add = gemm.node, only_reader(gemm.node)
    left, right = node.inputs[:2]
    if node.op_type != "MatMul" or add is None or add.op_type != "Add" or left is None or right is None:
        return None
    bias = _other(add, node.outputs[0])
    rows, columns = shape_of(left), shape_of(right)
    if bias is None or len(columns) != 2 or not rows or (len(rows) != 2 and None in rows):
        return None
    shape, width = shape_of(bias), columns[1]
    if shape == (width,):
        return add
    whole = len(rows) == 2 and len(shape) == 2 and (shape == (1, width) or (shape[0] == rows[0] and shape[1] in (1, width)))
    return add if whole else None


def bias_of(gemm: Gemm) -> tuple[ir.Value | None, Operand | None]:
    """The bias of a Gemm or Conv, or of the Gemm that a MatMul and an Add become, and its DequantizeLinear."""
    add = becomes_gemm(gemm)
    if add is not None:
        value = _other(add, gemm.node.outputs[0])
        return value, operand_of(value)
    if gemm.node.op_type not in ("Gemm", "Conv") or len(gemm.node.inputs) < 3:
        return None, None
    return gemm.node.inputs[2], gemm.bias


def requantizes(gemm: Gemm) -> bool:
    """Whether ONNX Runtime quantizes a float weight or bias itself: those of a Gemm or Conv between quantized values."""
    if gemm.node.op_type not in ("Gemm", "Conv") and becomes_gemm(gemm) is None:
        return False
    weight = gemm.node.inputs[1]
    constant_weight = gemm.right is not None or (weight is not None and constant(weight) is not None)
    return constant_weight and _quantize(gemm) is not None


def result(gemm: Gemm) -> Judgement | None:
    """Whether the operators after the GEMM leave it an integer kernel."""
    end = becomes_gemm(gemm) or gemm.node
    clip = _clip(end)
    if clip is not None and (_quantize(gemm) is None or not _covers(clip)):
        return (
            "float",
            f"a {clip.op_type} behind it that no QuantizeLinear makes needless",
            "an operator between them, or quantize",
        )
    quantize = _quantize(gemm)
    if quantize is None:
        if any(reader.op_type == "QuantizeLinear" for reader in readers(end)):
            return "float", "a QuantizeLinear and other operators read its result", "one reader, the QuantizeLinear"
        if gemm.node.op_type == "Conv":
            return "float", "no QuantizeLinear behind the Conv", "quantize its result, too: an integer Conv gives codes"
        return None
    if gemm.left is not None and _effective(gemm.left) != _result_type(quantize):
        return "float", "codes of the result of another type than the activation's", UNSIGNED
    scale = constant(quantize.inputs[1])
    if scale is not None and scale.size > 1:
        return "rejected", "a scale along an axis of the result: the integer kernel fails when it runs", "one scale per tensor"
    return None


def _other(add: ir.Node, value: ir.Value) -> ir.Value | None:
    return next((item for item in add.inputs if item is not value), None)


def _clip(end: ir.Node) -> ir.Node | None:
    """The only Relu or Clip after the GEMM, which has only one reader itself."""
    reader = only_reader(end)
    return reader if reader is not None and reader.op_type in CLIPS and only_reader(reader) is not None else None


def _quantize(gemm: Gemm) -> ir.Node | None:
    """The only QuantizeLinear after the GEMM, past a Relu or Clip."""
    end = becomes_gemm(gemm) or gemm.node
    reader = only_reader(_clip(end) or end)
    return reader if reader is not None and reader.op_type == "QuantizeLinear" else None


def _covers(clip: ir.Node) -> bool:
    """Whether the QuantizeLinear after it cuts off at least what the Relu or Clip cuts off."""
    quantize = only_reader(clip)
    scale = constant(quantize.inputs[1]) if quantize is not None else None
    if quantize is None or scale is None or scale.size != 1:
        return False
    zero = constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else np.zeros(1)
    bounds = BOUNDS.get(codes_of(quantize))
    if zero is None or bounds is None:
        return False
    low, high = ((bound - float(zero.reshape(-1)[0])) * float(scale.reshape(-1)[0]) for bound in bounds)
    if clip.op_type == "Relu":
        return low >= 0
    limits = [constant(clip.inputs[index]) if len(clip.inputs) > index else None for index in (1, 2)]
    smallest, largest = (
        float(limit.reshape(-1)[0]) if limit is not None else default
        for limit, default in zip(limits, (-np.inf, np.inf), strict=True)
    )
    return low >= smallest and high <= largest


def _effective(operand: Operand) -> ir.DataType | None:
    return ir.DataType.UINT8 if operand.dtype == ir.DataType.INT8 and why_signed(operand) is None else operand.dtype


def _result_type(quantize: ir.Node) -> ir.DataType | None:
    users = readers(quantize)
    operand = operand_of(users[0].outputs[0]) if len(users) == 1 and users[0].op_type == "DequantizeLinear" else None
    if operand is None:
        return codes_of(quantize)
    several = len(readers(operand.dequantize)) > 1
    return operand.dtype if several else _effective(operand)
