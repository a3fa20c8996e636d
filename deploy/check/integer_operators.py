"""Operators that work on codes without a DequantizeLinear, and which target has them."""

from __future__ import annotations

import re

import onnx_ir as ir

from .gemm import Judgement
from .operand import codes_of
from .rules_cuda import ELSEWHERE
from .rules_nvidia import INT8

QUANTIZE = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
PRODUCTS = frozenset(
    {
        "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm", "QAttention", "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul", "MatMulInteger16", "MatMulNBits", "MatMulBnb4", "DynamicQuantizeLSTM",
    }
)  # fmt: skip
"""Operators on codes that multiply matrices."""
UNPACKING = frozenset({"MatMulNBits", "MatMulBnb4"})
"""Operators of `PRODUCTS` that read floats and unpack a weight inside."""
OTHERS = frozenset(
    {
        "DynamicQuantizeLinear", "GatherBlockQuantized", "QEmbedLayerNormalization", "QLinearAdd", "QLinearMul", "QLinearConcat",
        "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearWhere", "QLinearAveragePool", "QLinearGlobalAveragePool",
        "QLinearReduceMean",
    }
)  # fmt: skip
"""Operators on codes that do not multiply matrices; ONNX Runtime's CPU provider has all of both groups."""
CUDA = frozenset({"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"})
SIGNED_CUDA = frozenset({"MatMulInteger", "QAttention"})
"""Operators whose CUDA kernels take int8 for both operands."""
LOOKS = re.compile(r"Q(Linear|Gemm|Attention|Embed|Ordered)|.*(Quantize|Integer|NBits|Bnb4)|TRT_(FP4|FP8|INT4|MXFP8)")
QDQ = "write QuantizeLinear, DequantizeLinear and MatMul: quantize_static with QuantFormat.QDQ does"


def is_quantized(node: ir.Node, target: str) -> bool:
    """Whether an operator, by its name, works on codes without a DequantizeLinear, or is one that the target lacks."""
    if node.op_type in QUANTIZE:
        return node.op_type == "DynamicQuantizeLinear" and target in ("trt", "trt-rtx")
    return LOOKS.match(node.op_type) is not None


def multiplies(node: ir.Node) -> bool:
    """Whether it is a matrix product or convolution."""
    return node.op_type in PRODUCTS


def judged(node: ir.Node, target: str) -> Judgement:
    """What a target does with such an operator."""
    kind = node.op_type
    if kind not in PRODUCTS | OTHERS:
        return "unknown", f"{kind}: no rule of this program knows the operator", "build it and look"
    if target in ("trt", "trt-rtx"):
        return "rejected", f"{kind} is not imported", QDQ
    if target == "ort":
        return _cpu(node)
    if kind in CUDA:
        return "low precision", "", ""
    if kind in SIGNED_CUDA and all(_code_type(value) == INT8 for value in node.inputs[:2]):
        return "low precision", "", ""
    refusal = _cpu(node)
    if refusal[0] == "rejected":
        return refusal
    return "float", f"{kind} has no kernel in the CUDA provider: it runs on the CPU, with copies to and fro", ELSEWHERE


def _cpu(node: ir.Node) -> Judgement:
    types = [_code_type(node.inputs[index]) if len(node.inputs) > index else None for index in (0, 3)]
    if node.op_type == "QLinearMatMul" and types == [INT8, ir.DataType.UINT8]:
        return "rejected", "QLinearMatMul of int8 and uint8 has no kernel", "int8 for both, or a uint8 activation"
    return "low precision", "", ""


def _code_type(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    maker = value.producer()
    if maker is not None and maker.op_type == "QuantizeLinear":
        return codes_of(maker)
    return value.const_value.dtype if value.const_value is not None else value.dtype
