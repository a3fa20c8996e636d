"""How ONNX Runtime's CUDA provider runs a quantized GEMM.

Measured on an NVIDIA H200 with ONNX Runtime 1.31: what its graphs become, and their outputs (`benchmarks/checker.py`).
"""

from __future__ import annotations

import onnx_ir as ir

from .gemm import Gemm, GemmRule, Judgement
from .operand import Operand
from .ort_refusals import counts, loads
from .ort_unpacking import direct, unpacked

ELSEWHERE = (
    "its TensorRT provider, the TensorRT-RTX plug-in (onnxruntime-ep-nv-tensorrt-rtx), or weights alone in blocks (MatMulNBits)"
)
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def blocks(operand: Operand) -> Judgement | None:
    """The reason that the provider refuses a QuantizeLinear or DequantizeLinear in blocks; None if it does not."""
    if not operand.blocked or operand.dtype not in EIGHT_BITS:
        return None  # int4 has kernels; other types run on the CPU
    return "rejected", "the CUDA provider has no QuantizeLinear and DequantizeLinear for blocks of 8 bits", "blocks of int4"


def _integer(gemm: Gemm) -> Judgement | None:
    activation = gemm.left is not None and direct(gemm, gemm.left)
    if not activation and gemm.node.op_type in ("MatMul", "Gemm") and direct(gemm, gemm.right):
        return None
    refusal = next((item for operand in gemm.operands if (item := blocks(operand)) is not None), None)
    return refusal or (
        "float",
        "ONNX Runtime's CUDA provider has no integer GEMM for QuantizeLinear and DequantizeLinear",
        ELSEWHERE,
    )


def _unpacked(gemm: Gemm) -> Judgement | None:
    reason = unpacked(gemm)
    if not reason:
        return None
    assert gemm.right is not None
    return blocks(gemm.right) or ("float", reason, "blocks of 16, 32, 64 … along axis 0 of a weight [in, out]")


CUDA: tuple[GemmRule, ...] = (loads, counts, _integer, _unpacked)
