"""How ONNX Runtime's CPU provider on x86-64 runs a quantized GEMM: on an integer kernel, in float, or not at all.

Measured on ONNX Runtime 1.31's optimised graphs of small models, and on their outputs (`benchmarks/checker.py`).
"""

from __future__ import annotations

import onnx_ir as ir

from .gemm import Gemm, GemmRule, Judgement
from .operand import Operand, shape_of
from .ort_refusals import counts, loads
from .ort_result import becomes_gemm, bias_of, requantizes, result
from .ort_unpacking import direct, unpacked
from .signedness import UNSIGNED, breaks, why_signed

BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
PER_CHANNEL = "one scale per output channel"
PER_TENSOR = "one scale per tensor; factor per-token scales out"
ROW = "MatMul and Add, with an input of rank 3"


def _kernels(gemm: Gemm) -> Judgement | None:
    if gemm.node.op_type in ("ConvTranspose", "Einsum"):
        return "float", f"no integer kernel for {gemm.node.op_type}", "MatMul, Gemm or Conv where the shapes allow it"
    return None


def _one_sided(gemm: Gemm) -> Judgement | None:
    if direct(gemm, gemm.left):
        if direct(gemm, gemm.right) or requantizes(gemm):
            return None
        return "float", "the weight has no DequantizeLinear before it", "quantize the weight, too"
    if gemm.node.op_type not in ("MatMul", "Gemm") or not direct(gemm, gemm.right):
        return "float", "the activation has no DequantizeLinear before it", "quantize it, too"
    reason = unpacked(gemm)
    fix = "quantize the activation, or store blocks of 16, 32, 64 … along axis 0 of a weight [in, out]"
    return ("float", reason, fix) if reason else ("low precision", "", "")


def _types(gemm: Gemm) -> Judgement | None:
    types = {operand.dtype for operand in gemm.operands}
    if any(operand.float_type == ir.DataType.FLOAT16 for operand in gemm.operands):
        return "float", "float16: the CPU provider multiplies integers under float32 only", "float32 around the GEMM"
    names = sorted(dtype.name.lower() if dtype else "unknown" for dtype in types - set(BYTES))
    if not names:
        return None
    # Its choice of a kernel leaves out types of 4 and 16 bits only.
    integer_kernel = all(name.startswith("float8") for name in names) and (gemm.node.op_type != "Conv" or requantizes(gemm))
    if integer_kernel and direct(gemm, gemm.right):
        return "rejected", "float8: ONNX Runtime chooses an integer kernel, which refuses it", "int8 weights, uint8 activations"
    return "float", f"no kernel for {' and '.join(names)} on a CPU", "int8 weights and uint8 activations"


def _views(gemm: Gemm) -> Judgement | None:
    for operand in gemm.operands:
        reason = breaks(operand, gemm.opset)
        if reason:
            return "rejected", f"{reason}: ONNX Runtime's rewrite to uint8 is not a valid graph", UNSIGNED
        if any(view.op_type == "Cast" for view in operand.after):
            return "float", "a Cast between DequantizeLinear and GEMM", "scales of the GEMM's own type"
        moved = [view.op_type for view in operand.after]
        if operand.quantize is None and moved not in ([], ["Transpose"]):
            return "float", f"{moved[0]} between the weight and its GEMM", "store the weight in the shape that the GEMM reads"
    return None


def _granularity(gemm: Gemm) -> Judgement | None:
    left, right = gemm.left, gemm.right
    if left is not None and left.scales != 1:
        form = "blocks" if left.blocked else "a scale along an axis"
        if why_signed(left) is None and not _is_gemm(gemm):
            return "rejected", f"{form} of the activation: the integer kernel fails when it runs", PER_TENSOR
        return "float", f"{form} of the activation", PER_TENSOR
    if right is None or right.scales == 1:
        return None
    if right.blocked:
        one = right.scale is not None and right.axis < right.scale.ndim and right.scale.shape[right.axis] == 1
        return None if one else ("rejected", "weights in blocks: the integer kernel fails when it runs", PER_CHANNEL)
    codes = right.dequantize.inputs[0]
    if gemm.node.op_type == "MatMul" and codes is not None and len(shape_of(codes)) > 2:
        return "rejected", "scales of a second operand of rank 3: the integer kernel fails when it runs", "one scale per tensor"
    if gemm.output_axis is not None and right.axis != gemm.output_axis:
        return "rejected", "the weight's scales lie along its input: other numbers, or none", PER_CHANNEL
    return None


def _signed(gemm: Gemm) -> Judgement | None:
    left, right = gemm.left, gemm.right
    reason = why_signed(left) if left is not None else None
    if reason is None or (_is_gemm(gemm) and right is not None and right.dtype == ir.DataType.INT8):
        return None
    return ("float", *reason)


def _joined(gemm: Gemm) -> Judgement | None:
    """A MatMul and an Add that become Reshape, Gemm and Reshape, where the first Reshape follows the DequantizeLinear."""
    if becomes_gemm(gemm) is None or gemm.left is None:
        return None
    rank = len(shape_of(gemm.node.inputs[0])) if gemm.node.inputs[0] is not None else 2
    if rank != 2 and gemm.opset >= 21 and gemm.left.dtype == ir.DataType.INT8 and why_signed(gemm.left) is None:
        return (
            "rejected",
            "MatMul and Add of fixed shapes: ONNX Runtime's rewrite of int8 to uint8 is not a valid graph",
            UNSIGNED,
        )
    return None


def _zero_points(gemm: Gemm) -> Judgement | None:
    if not _is_gemm(gemm):
        return None
    for operand, label in ((gemm.left, "activation"), (gemm.right, "weight")):
        if operand is not None and (len(operand.dequantize.inputs) < 3 or operand.dequantize.inputs[2] is None):
            return "float", f"the DequantizeLinear of its {label} has no zero point", "write it, although it is 0"
    return None


def _bias(gemm: Gemm) -> Judgement | None:
    value, operand = bias_of(gemm)
    if value is None:
        return None
    if operand is None:
        if requantizes(gemm) and value.producer() is None and value.const_value is not None:
            return None
        return "float", "a bias in float, with which it is not an integer GEMM", f"{ROW}; or an int32 bias with scale s_x * s_w"
    return _stored_bias(gemm, operand)


def _stored_bias(gemm: Gemm, operand: Operand) -> Judgement | None:
    factors = [gemm.node.attributes.get(name) for name in ("alpha", "beta")]
    if any(item is not None and item.value != 1.0 for item in factors):
        return "float", "alpha or beta beside an int32 bias", "alpha and beta of 1"
    if operand.dtype != ir.DataType.INT32:
        return "float", "a bias of another type than int32", "an int32 bias with scale s_x * s_w"
    scales = [item.scale for item in (operand, gemm.left, gemm.right) if item is not None]
    if len(scales) < 3 or any(scale is None for scale in scales):
        return None
    bias, left, right = (scale.astype("float64") for scale in scales if scale is not None)
    if (abs(bias - left * right.reshape(-1)) <= 1e-3 * abs(bias)).all():
        return None
    verdict = "float" if gemm.node.op_type == "Conv" else "rejected"
    return verdict, "an int32 bias whose scale is not s_x * s_w: other numbers", "scale the bias by s_x * s_w"  # type: ignore[return-value]


def _is_gemm(gemm: Gemm) -> bool:
    return gemm.node.op_type == "Gemm" or becomes_gemm(gemm) is not None


ORT: tuple[GemmRule, ...] = (
    loads, counts, _kernels, _one_sided, _types, _views, _granularity, _joined, _signed, _zero_points, _bias, result,
)  # fmt: skip
