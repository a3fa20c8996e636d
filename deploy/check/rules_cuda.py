"""How ONNX Runtime's CUDA provider runs a quantized GEMM. From its sources and its public bug reports, not measured here."""

from __future__ import annotations

import onnx_ir as ir

from .gemm import Gemm, GemmRule, Judgement
from .ort_unpacking import direct, unpacked

ELSEWHERE = (
    "its TensorRT provider, the TensorRT-RTX plug-in (onnxruntime-ep-nv-tensorrt-rtx), or weights alone in blocks (MatMulNBits)"
)
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _integer(gemm: Gemm) -> Judgement | None:
    if gemm.left is None and gemm.node.op_type in ("MatMul", "Gemm") and direct(gemm, gemm.right):
        return None
    return "float", "ONNX Runtime's CUDA provider has no integer GEMM for QuantizeLinear and DequantizeLinear", ELSEWHERE


def _unpacked(gemm: Gemm) -> Judgement | None:
    why = unpacked(gemm)
    return ("float", why, "blocks of 16, 32, 64 … along axis 0 of a weight [in, out]") if why else None


CUDA: tuple[GemmRule, ...] = (_integer, _unpacked)
