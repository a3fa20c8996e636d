"""How TensorRT and TensorRT-RTX run a quantized operator: in low precision, in float or not at all.

Measured on builds of TensorRT-RTX 1.7 (`benchmarks/checker.py`); TensorRT also has the restrictions of NVIDIA's documentation.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dq_export.passes.match import only_user

from .gemm import CONVOLUTIONS, Gemm, GemmRule, Judgement, readers
from .operand import Operand, shape_of

INT8, UINT8, INT4, FP8 = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN
CODES = (INT8, INT4, FP8, UINT8)
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""The targets of TensorRT-RTX 1.7, the oldest first; it has no sm90 and no sm100."""
FIRST_TARGET = {INT4: "sm80", FP8: "sm89"}
INT32_BIAS: Judgement = (
    "rejected",
    "an int32 bias behind a DequantizeLinear",
    "a float bias: quantize_static(…, extra_options={'QuantizeBias': False}) of onnxruntime writes one",
)


def refused(operand: Operand) -> Judgement | None:
    """Why the parser refuses a pair of QuantizeLinear and DequantizeLinear, or reads other codes than ONNX; None if it does not.

    This applies to every pair, before a GEMM or not.
    """
    if operand.dtype == ir.DataType.INT32:
        return INT32_BIAS
    if operand.dtype not in CODES:
        name = operand.dtype.name if operand.dtype else "an unknown type"
        return "rejected", f"codes of {name}", "use int8, int4 or float8e4m3fn"
    if operand.dtype == UINT8:
        return "rejected", "uint8 is read as int8: other numbers", "use int8 with zero point 0"
    if operand.shifted():
        return "rejected", "a zero point that is not 0", "fold the shift into the bias before (in_shift)"
    if operand.blocked and operand.quantize is not None:
        return "rejected", "blocks of an activation are multiplied by the wrong scales", "one scale per tensor"
    if operand.dtype == INT4 and operand.quantize is not None:
        return "rejected", "int4 activations", "int4 is for weights"
    if operand.quantize is None and any(view.op_type == "Transpose" for view in operand.before):
        return "rejected", "a Transpose between stored codes and DequantizeLinear", "transpose behind, or store them so"
    return _scales(operand)


def _scales(operand: Operand) -> Judgement | None:
    scale, codes = operand.scale, operand.dequantize.inputs[0]
    if scale is None:
        return None
    values = scale.astype(np.float32)
    if not (np.isfinite(values) & (values > 0)).all():
        return "rejected", "a scale that is not positive", "give empty channels a scale of 1"
    shape = shape_of(codes) if codes is not None else ()
    axis = operand.axis
    if scale.ndim == 1 and scale.size > 1 and axis < len(shape) and shape[axis] not in (None, scale.size):
        return "rejected", f"{scale.size} scales for {shape[axis]} channels", "one scale for each index of the axis"
    if not operand.blocked or not shape:
        return None
    if scale.ndim != len(shape):
        return "rejected", f"scales of rank {scale.ndim} for blocks of a tensor of rank {len(shape)}", "one axis is divided"
    if not 0 <= axis < len(shape):
        return "rejected", f"blocks along axis {axis} of a tensor of rank {len(shape)}", "name one of its axes"
    if axis < len(shape) - 2:
        return "rejected", f"blocks along axis {axis} of a tensor of rank {len(shape)}", "only the last two axes may be divided"
    if any(s != d for i, (s, d) in enumerate(zip(scale.shape, shape, strict=True)) if i != axis):
        return "rejected", "blocks along more than one axis", "only the axis of the blocks is divided"
    block = operand.block_size
    if not block or shape[axis] != block * scale.shape[axis]:
        reason = f"block_size {block} does not divide {shape[axis]} into {scale.shape[axis]}: other blocks than ONNX's, or none"
        return "rejected", reason, "choose a block size that divides the axis"
    return None


def refused_at_run_time(operand: Operand) -> Judgement | None:
    """TensorRT needs constant scales everywhere."""
    return None if operand.scale is not None else ("rejected", *RUN_TIME)


RUN_TIME = ("a scale that is computed at run time", "factor it: x*(c/s) -> Q/DQ with constant c -> GEMM -> *(s/c)")


def _operands(gemm: Gemm) -> Judgement | None:
    if gemm.bias is not None:
        return INT32_BIAS if gemm.bias.dtype == ir.DataType.INT32 else refused(gemm.bias)
    return next((judgement for operand in gemm.operands if (judgement := refused(operand)) is not None), None)


def _compute(gemm: Gemm) -> Judgement | None:
    for operand in gemm.operands:
        needed = FIRST_TARGET.get(operand.dtype) if operand.dtype else None
        old = [target for target in gemm.compute if needed and TARGETS.index(target) < TARGETS.index(needed)]
        if old and operand.dtype is not None:
            return "rejected", f"{operand.dtype.name} on {old[0]}", f"build for {needed} or later"
    return None


def _float_types(gemm: Gemm) -> Judgement | None:
    if gemm.weight_only and gemm.right is not None and any(view.op_type == "Cast" for view in gemm.right.after):
        return "float", "a Cast between DequantizeLinear and GEMM", "scales of the GEMM's own type"
    types = set()
    for value, operand in zip(gemm.node.inputs[:2], (gemm.left, gemm.right), strict=True):
        if operand is None:
            types |= {value.dtype} if value is not None else set()
            continue
        scale = operand.dequantize.inputs[1]
        types |= {operand.float_type, scale.dtype if scale is not None else None}
        types |= {operand.source.dtype} if operand.quantize is not None else set()
        types |= {view.outputs[0].dtype for view in operand.after if view.op_type == "Cast"}
    names = sorted(dtype.name for dtype in types if dtype is not None)
    if len(names) > 1:
        return "rejected", f"operands of {' and '.join(names)}", "one float type through x, both scales and the weight"
    return None


def _mixed(gemm: Gemm) -> Judgement | None:
    left, right = gemm.left, gemm.right
    if left is None or right is None:
        return None
    if _blocks(right) > 1:
        return "rejected", "weights in blocks under quantized activations", "leave the activation float, or one scale per channel"
    if right.dtype == INT4 and gemm.node.op_type in CONVOLUTIONS:
        return "rejected", "an int4 kernel of a convolution under quantized activations", "an int8 kernel"
    if right.dtype == INT4 and left.dtype != INT8:
        return "rejected", "int4 weights under float8 activations", "leave the activation float (w4a16), or float8 weights"
    if {left.dtype, right.dtype} == {INT8, FP8}:
        return "rejected", "an int8 and a float8 operand", "give both operands one type"
    return None


def _blocks(operand: Operand) -> int:
    """How many blocks divide the axis; 0 without blocks."""
    scale = operand.scale
    return scale.shape[operand.axis] if operand.blocked and scale is not None and operand.axis < scale.ndim else 0


def _shared_blocks(gemm: Gemm) -> Judgement | None:
    """The builder ends with a segmentation fault."""
    right = gemm.right
    if right is None or right.dtype != INT4 or not right.blocked or not right.stored:
        return None
    if len(readers(right.dequantize)) < 2 and len(list(right.source.uses())) < 2:
        return None
    return "rejected", "int4 blocks that several GEMMs read", "a DequantizeLinear for each GEMM"


def _run_time(gemm: Gemm) -> Judgement | None:
    computed = [operand.dequantize.inputs[1] for operand in gemm.operands if operand.scale is None]
    if not computed:
        return None
    scalar = any(value is not None and value.shape is not None and len(value.shape) == 0 for value in computed)
    if gemm.node.op_type == "Conv" and len(gemm.operands) > 1 and scalar:
        return "rejected", "a convolution's scale that is one number, computed at run time: the builder crashes", RUN_TIME[1]
    return ("float", *RUN_TIME)


def _run_time_trt(gemm: Gemm) -> Judgement | None:
    return next((judgement for operand in gemm.operands if (judgement := refused_at_run_time(operand)) is not None), None)


def _kernels(gemm: Gemm) -> Judgement | None:
    if gemm.node.op_type == "ConvTranspose":
        return "float", "no low-precision kernel for ConvTranspose", "nothing; leave it float"
    return None


def _one_sided(gemm: Gemm) -> Judgement | None:
    left, right = gemm.left, gemm.right
    if right is None:
        return "float", "the weight has no QuantizeLinear and DequantizeLinear", "quantize the weight, too"
    if left is not None:
        return None
    if right.dtype != INT4 or right.quantize is not None or gemm.node.op_type in CONVOLUTIONS:
        return "float", "the activation has no QuantizeLinear and DequantizeLinear", "quantize it, or store int4 blocks"
    if not right.blocked:
        return "float", "int4 without blocks is unpacked by a separate kernel", "blocks along the input, of 64 or 128"
    if right.scale is not None and right.scale.size > 1 and right.scale.shape[right.axis] == 1:
        return "float", "one block per channel is unpacked by a separate kernel", "at least two blocks along the axis"
    return None


def _granularity(gemm: Gemm) -> Judgement | None:
    left, right = gemm.left, gemm.right
    if left is not None and left.scales != 1 and not _rows(gemm):
        return "float", "a scale along an axis of the first operand", "one scale per tensor; factor per-token scales out"
    if right is None or right.scale is None or right.dtype == INT4:
        return None
    if _blocks(right) > 1 or (right.blocked and left is None):
        return "float", f"{'int8' if right.dtype == INT8 else 'float8'} weights in blocks", "one scale per output channel"
    axis = gemm.output_axis
    if right.scale.size > 1 and not right.blocked and axis is not None and axis != right.axis:
        return "float", "the weight's scales lie along its input", "one scale per output channel"
    return None


def _rows(gemm: Gemm) -> bool:
    """Whether the first operand is a matrix with a scale for each row, which is applied to the product's rows."""
    codes = gemm.left.dequantize.inputs[0] if gemm.left is not None else None
    matrix = codes is not None and len(shape_of(codes)) == 2
    return matrix and gemm.left is not None and not gemm.left.after and gemm.left.axis == 0 and gemm.node.op_type == "MatMul"


def _split(gemm: Gemm) -> Judgement | None:
    """One GEMM for q, k and v, whose stored weight has a scale for each output channel: the builder splits it into heads."""
    right = gemm.right
    if gemm.left is None or right is None or right.quantize is not None or right.scale is None or right.scale.size == 1:
        return None
    user = only_user(gemm.node.outputs[0])
    while user is not None and user.op_type == "Add":
        user = only_user(user.outputs[0])
    if user is None:
        return None
    kinds = [reader.op_type for reader in readers(user)]
    if user.op_type == "Reshape" and kinds == ["Transpose"]:
        turned = only_user(user.outputs[0])
        kinds = [reader.op_type for reader in readers(turned)] if turned else []
        cut = kinds.count("Gather") > 1 or kinds == ["Split"]
    else:
        cut = user.op_type == "Split" and "Reshape" in kinds
    if cut:
        return "float", "one GEMM for q, k and v with a scale per output channel", "a GEMM for each of q, k and v"
    return None


COMMON: tuple[GemmRule, ...] = (_operands, _compute, _float_types, _shared_blocks, _mixed)
KERNELS: tuple[GemmRule, ...] = (_kernels, _one_sided, _granularity, _split)
TRT_RTX: tuple[GemmRule, ...] = (*COMMON, _run_time, *KERNELS)
TRT: tuple[GemmRule, ...] = (*COMMON, _run_time_trt, *KERNELS)
