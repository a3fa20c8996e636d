"""Which stored weights ONNX Runtime unpacks inside a kernel, MatMulNBits, under float activations."""

from __future__ import annotations

import onnx_ir as ir

from .gemm import Gemm, readers
from .operand import Operand, attribute, shape_of
from .ort_result import bias_of

BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
BYTES_SINCE = (1, 25)
"""The first version of ONNX Runtime that unpacks blocks of 8 bits in a kernel; earlier ones do it before each MatMul."""
BYTES_IN_FLOAT = f"before version {'.'.join(map(str, BYTES_SINCE))}, ONNX Runtime multiplies blocks of 8 bits in float"
"""Why an earlier version does not run them in low precision."""
NARROW = (*BYTES, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2)
UNMOVED = ("Flatten",)
"""Views that are not swapped with a preceding DequantizeLinear."""


def direct(gemm: Gemm, operand: Operand | None) -> bool:
    """Whether a GEMM reads a DequantizeLinear of its own graph, or one that ONNX Runtime moves next to it."""
    if operand is None or operand.dequantize.graph is not gemm.node.graph:
        return False
    return not any(view.op_type in UNMOVED for view in operand.after)


def unpacked(gemm: Gemm) -> str:
    """The reason that MatMulNBits does not take the weight; empty if it does."""
    right, node = gemm.right, gemm.node
    assert right is not None
    codes = right.dequantize.inputs[0]
    shape = shape_of(codes) if codes is not None else ()
    views = [view.op_type for view in right.after]
    if right.dtype not in NARROW or not right.stored or right.scale is None or len(shape) != 2:
        return "only stored weights [in, out] of 2, 4 or 8 bits with constant scales are unpacked in a kernel"
    if len(readers(right.dequantize)) > 1 or len(list(right.source.uses())) > 1:
        return "a weight that several operators read is not unpacked in a kernel"
    if views and (views != ["Transpose"] or right.dtype not in BYTES or right.blocked):
        return f"a {views[0]} between the weight and its GEMM"
    if any(reader.op_type == "QuantizeLinear" for reader in readers(node)):
        return "the kernel that unpacks weights gives floats, and a QuantizeLinear follows"
    if node.op_type == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "transB", 0) or _scaled(node)):
        return "a Gemm that transposes or scales does not unpack weights"
    bias, _ = bias_of(gemm)
    if bias is not None and len(shape_of(bias)) != 1:
        return "a Gemm with a bias of rank 2 does not unpack weights"
    if not right.blocked:
        return _channels(right, shape, 0 if views else 1)
    whole = right.block_size >= 16 and right.block_size & (right.block_size - 1) == 0
    return (
        ""
        if whole and right.spelled_axis == 0
        else "its blocks are not 16, 32, 64 … codes long, or not along axis 0 as it is written"
    )


def _channels(right: Operand, shape: tuple[int | None, ...], axis: int) -> str:
    scale = right.dequantize.inputs[1]
    if scale is not None and not shape_of(scale):
        return ""
    if right.scales == shape[axis] and right.spelled_axis == axis:
        return ""
    return "its scales do not lie along the output as the kernel wants them: axis 1, one a channel, or one scalar"


def _scaled(node: ir.Node) -> bool:
    factors = [node.attributes.get(name) for name in ("alpha", "beta")]
    return any(item is not None and item.value != 1.0 for item in factors)
