"""The rules by which a backend runs a quantized GEMM in low precision, in float or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from dq_export.passes.base import constant
from dq_export.passes.match import only_user

from .chain import Chain, shape_of

Verdict = Literal["rejected", "float", "low precision"]
INT8, INT4, FP8 = ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN
KNOWN = (INT8, INT4, FP8, ir.DataType.UINT8)
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX 1.7 builds for, the oldest first; it has no sm90 and no sm100."""
Told = tuple[Verdict, str, str]
Rule = Callable[[ir.Node, Chain | None, Chain | None, Sequence[str]], Told | None]


def _types(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for chain in filter(None, (left, right)):
        if chain.dtype not in KNOWN:
            name = chain.dtype.name if chain.dtype else "an unknown type"
            return "rejected", f"codes of {name}", "use int8, int4 or float8e4m3fn"
        if chain.dtype == ir.DataType.UINT8:
            return "rejected", "uint8 is taken for int8: other numbers", "use int8 with zero point 0"
    since = {INT4: "sm80", FP8: "sm89"}
    for chain in filter(None, (left, right)):
        needed = since.get(chain.dtype) if chain.dtype else None
        old = [target for target in compute if needed and TARGETS.index(target) < TARGETS.index(needed)]
        if old:
            assert chain.dtype is not None
            return "rejected", f"{chain.dtype.name} on {old[0]}", f"build for {needed} or later"
    return None


def _zero_points(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for chain in filter(None, (left, right)):
        for item in filter(None, (chain.dequantize, chain.quantize)):
            zero = constant(item.inputs[2]) if len(item.inputs) > 2 else None
            if zero is not None and zero.astype(np.float32).any():
                return "rejected", "a zero point that is not 0", "fold the shift into the bias before (in_shift)"
    return None


def _scales(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for chain in filter(None, (left, right)):
        scale = chain.scale
        if scale is None:
            continue
        if not (scale.astype(np.float32) > 0).all():
            return "rejected", "a scale that is not positive", "give empty channels a scale of 1"
        shape = shape_of(chain.source)
        if scale.ndim == 1 and scale.size > 1 and chain.axis < len(shape) and shape[chain.axis] not in (None, scale.size):
            return "rejected", f"{scale.size} scales for {shape[chain.axis]} channels", "one scale for each index of the axis"
        if chain.blocked and shape:
            block = chain.dequantize.attributes.get_int("block_size", 0)
            if scale.ndim != len(shape):
                return (
                    "rejected",
                    f"scales of rank {scale.ndim} for blocks of a tensor of rank {len(shape)}",
                    "one axis is divided",
                )
            if any(s != d for i, (s, d) in enumerate(zip(scale.shape, shape, strict=True)) if i != chain.axis):
                return "rejected", "blocks along more than one axis", "only the axis of the blocks is divided"
            if not block or shape[chain.axis] != block * scale.shape[chain.axis]:
                told = f"block_size {block} does not divide {shape[chain.axis]} into {scale.shape[chain.axis]}"
                return "rejected", f"{told}: other blocks than ONNX's, or none", "choose a block size that divides the axis"
    return None


def _float_types(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    found = set()
    for index, chain in enumerate((left, right)):
        value = chain.dequantize.inputs[1] if chain else node.inputs[index]
        dtype = value.dtype if value is not None else None
        if dtype is not None:
            found.add(dtype.name)
        if chain and chain.quantize is not None and chain.quantize.inputs[0] is not None:
            read = chain.quantize.inputs[0].dtype
            found |= {read.name} if read is not None else set()
    if len(found) > 1:
        return "rejected", f"operands of {' and '.join(sorted(found))}", "one float type through x, both scales and the weight"
    return None


def _mixed(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    if left is None or right is None:
        return None
    if left.dtype == INT4:
        return "rejected", "int4 activations", "int4 is for weights"
    if right.blocked:
        return "rejected", "weights in blocks under quantized activations", "leave the activation float, or one scale a channel"
    if right.dtype == INT4:
        return "float", "int4 weights under quantized activations", "leave the activation float (w4a16), or int8 weights"
    if {left.dtype, right.dtype} == {INT8, FP8}:
        return "rejected", "an int8 and a float8 operand", "give both operands one type"
    return None


def _run_time(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for chain in filter(None, (left, right)):
        if chain.scale is None:
            return "float", "a scale that is computed at run time", "factor it: x*(c/s) -> Q/DQ with constant c -> GEMM -> *(s/c)"
    return None


def _run_time_trt(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    found = _run_time(node, left, right, compute)
    return ("rejected", *found[1:]) if found else None


def _one_sided(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    if right is None:
        return "float", "the weight has no QuantizeLinear and DequantizeLinear", "quantize the weight, too"
    if left is not None:
        return None
    if right.dtype != INT4:
        return "float", "the activation has no QuantizeLinear and DequantizeLinear", "quantize it, or store int4 blocks"
    if right.scale is not None and right.scale.size > 1 and right.blocked and right.scale.shape[right.axis] == 1:
        return "float", "one block a channel is unpacked by a kernel of its own", "at least two blocks along the axis"
    if not right.blocked:
        return "float", "int4 without blocks is unpacked by a kernel of its own", "blocks along the input, of 64 or 128"
    return None


def _granularity(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    if left is not None and left.scale is not None and left.scale.size > 1:
        return "float", "a scale along an axis of the activation", "one scale a tensor; factor per-token scales out"
    if right is None or right.scale is None or right.dtype == INT4:
        return None
    if right.blocked:
        return "float", f"{'int8' if right.dtype == INT8 else 'float8'} weights in blocks", "one scale an output channel"
    if right.scale.size > 1 and _output_axis(node, right) != right.axis % len(shape_of(right.source) or (0, 0)):
        return "float", "the weight's scales lie along its input", "one scale an output channel"
    return None


def _split(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    """One GEMM for q, k and v, whose stored weight has a scale an output channel: the builder cuts it into heads."""
    if left is None or right is None or right.quantize is not None or right.scale is None or right.scale.size == 1:
        return None
    user = only_user(node.outputs[0])
    while user is not None and user.op_type == "Add":
        user = only_user(user.outputs[0])
    if user is None:
        return None
    readers = [reader.op_type for output in user.outputs for reader, _ in output.uses()]
    if user.op_type == "Reshape" and readers == ["Transpose"]:
        turned = only_user(user.outputs[0])
        readers = [reader.op_type for reader, _ in turned.outputs[0].uses()] if turned else []
        cut = readers.count("Gather") > 1 or readers == ["Split"]
    else:
        cut = user.op_type == "Split" and "Reshape" in readers
    if cut:
        return "float", "one GEMM for q, k and v with a scale an output channel", "a GEMM for each of q, k and v"
    return None


def _ort_zero_points(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for label, chain in (("activation", left), ("weight", right)):
        if chain is not None and (len(chain.dequantize.inputs) < 3 or chain.dequantize.inputs[2] is None):
            return "float", f"the DequantizeLinear of its {label} has no zero point", "write it, although it is 0"
    return None


def _ort_form(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    if node.op_type == "Gemm":
        return "float", "a Gemm", "MatMul and Add, with an input of rank 3"
    if right is None:
        return "float", "the weight has no DequantizeLinear", "quantize the weight, too"
    if left is None:
        if right.blocked:
            return None
        return "float", "the activation has no DequantizeLinear", "quantize it, or store the weight in blocks"
    if right.blocked:
        return "float", "weights in blocks under quantized activations", "one scale an output channel, or float activations"
    if FP8 in (left.dtype, right.dtype) or INT4 in (left.dtype, right.dtype):
        return "float", "no kernel for these types on a CPU", "int8 weights and uint8 activations"
    if "axis" in left.dequantize.attributes and left.scale is not None and left.scale.size > 1:
        return "float", "a scale along an axis of the activation", "one scale a tensor; factor per-token scales out"
    if left.dtype == INT8 and len(list(left.dequantize.outputs[0].uses())) > 1:
        return "float", "an int8 activation that several GEMMs read", "uint8 with zero point 128"
    return None


def _output_axis(node: ir.Node, chain: Chain) -> int:
    """The axis of the stored weight that becomes the GEMM's output channels."""
    if node.op_type == "Conv":
        return 0
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    while producer is not None and producer is not chain.dequantize:
        if producer.op_type == "Transpose":
            turned = not turned
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return 0 if turned else 1


NVIDIA: tuple[Rule, ...] = (_types, _zero_points, _scales, _float_types, _mixed)
RULES: dict[str, tuple[Rule, ...]] = {
    "trt-rtx": (*NVIDIA, _run_time, _one_sided, _granularity, _split),
    "trt": (*NVIDIA, _run_time_trt, _one_sided, _granularity, _split),
    "ort": (_ort_zero_points, _ort_form),
}
