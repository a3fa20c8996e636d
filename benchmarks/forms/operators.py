"""Operators that work on codes by themselves: ONNX's QOperator format, com.microsoft's, and dynamic quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from .sketch import F16, INT4, INT8, MICROSOFT, TOKENS, UINT8, Form, K, N, Sketch

IMAGE = ("batch", 16, 16, 8)
FLAT = ("batch", K)
F32 = ir.DataType.FLOAT


def point(s: Sketch, value: int, kind: np.dtype) -> ir.Value:
    return s.constant(value, kind)


def product(s: Sketch, left: np.dtype, right: np.dtype, zero: int) -> ir.Value:
    """QLinearMatMul."""
    y = s.op(
        "QLinearMatMul",
        s.quantized(s.x, left, 0.05, zero),
        s.float(0.05),
        point(s, zero, left),
        s.codes((K, N), right),
        s.float(0.01),
        point(s, 0, right),
        s.float(0.3),
        point(s, zero, left),
        name="gemm",
    )
    return s.op("DequantizeLinear", y, s.float(0.3), point(s, zero, left))


def integers(s: Sketch) -> ir.Value:
    """MatMulInteger behind a QuantizeLinear."""
    y = s.op("MatMulInteger", s.quantized(s.x), s.codes((K, N), INT8), name="gemm")
    return s.op("Mul", s.op("Cast", y, to=s.dtype.value), s.float(0.0005))


def dynamic(s: Sketch, kind: np.dtype) -> ir.Value:
    """What quantize_dynamic writes."""
    codes, scale, zero = s.several("DynamicQuantizeLinear", s.x, outputs=3)
    y = s.op("MatMulInteger", codes, s.codes((K, N), kind), zero, point(s, 0, kind), name="gemm")
    return s.op("Mul", s.op("Cast", y, to=s.dtype.value), s.op("Mul", scale, s.float(0.01)))


def dynamic_pair(s: Sketch) -> ir.Value:
    codes, scale, zero = s.several("DynamicQuantizeLinear", s.x, outputs=3)
    return s.matmul(s.op("DequantizeLinear", codes, scale, zero), s.weight(axis=1))


def dynamic_alone(s: Sketch) -> ir.Value:
    return s.op("DequantizeLinear", *s.several("DynamicQuantizeLinear", s.x, outputs=3, name="gemm"))


def convolution(s: Sketch, kind: np.dtype, zero: int) -> ir.Value:
    """QLinearConv."""
    y = s.op(
        "QLinearConv",
        s.quantized(s.x, kind, 0.05, zero),
        s.float(0.05),
        point(s, zero, kind),
        s.codes((32, 16, 2, 2), INT8),
        s.float(0.01),
        point(s, 0, INT8),
        s.float(0.3),
        point(s, zero, kind),
        name="gemm",
    )
    return s.op("DequantizeLinear", y, s.float(0.3), point(s, zero, kind))


def integer_convolution(s: Sketch) -> ir.Value:
    y = s.op("ConvInteger", s.quantized(s.x, UINT8, 0.05, 128), s.codes((32, 16, 2, 2), INT8), point(s, 128, UINT8), name="gemm")
    return s.op("Mul", s.op("Cast", y, to=s.dtype.value), s.float(0.0005))


def blocks(s: Sketch) -> ir.Value:
    """MatMulNBits."""
    codes = s.constant(s.random.integers(0, 255, (N, 2, 32)), UINT8)
    return s.op(
        "MatMulNBits", s.x, codes, s.float(np.full(N * 2, 0.01)), name="gemm", domain=MICROSOFT, K=K, N=N, bits=4, block_size=64
    )


def bnb4(s: Sketch) -> ir.Value:
    codes, largest = s.constant(np.zeros(K * N // 2), UINT8), s.float(np.full(K * N // 64, 0.01))
    return s.op("MatMulBnb4", s.x, codes, largest, name="gemm", domain=MICROSOFT, K=K, N=N, block_size=64, quant_type=1)


def embedding(s: Sketch) -> ir.Value:
    table = s.constant(s.random.integers(-7, 8, (K, N)).astype(INT4))
    y = s.op(
        "GatherBlockQuantized",
        table,
        s.constant(np.arange(TOKENS)),
        s.float(np.full((K, N // 16), 0.01)),
        name="gemm",
        domain=MICROSOFT,
        block_size=16,
        quantize_axis=1,
    )
    return s.op("Add", s.x, y)


def to_float(s: Sketch) -> ir.Value:
    return s.op(
        "MatMulIntegerToFloat",
        s.quantized(s.x, UINT8, 0.05, 128),
        s.codes((K, N), INT8),
        s.float(0.05),
        s.float(0.01),
        point(s, 128, UINT8),
        point(s, 0, INT8),
        name="gemm",
        domain=MICROSOFT,
    )


def attention(s: Sketch) -> ir.Value:
    return s.op(
        "QAttention",
        s.quantized(s.x, UINT8, 0.05, 128),
        s.codes((K, 3 * K), INT8),
        s.float(np.zeros(3 * K)),
        s.float(0.05),
        s.float(0.01),
        None,
        point(s, 128, UINT8),
        point(s, 0, INT8),
        name="gemm",
        domain=MICROSOFT,
        num_heads=2,
    )


def addition(s: Sketch) -> ir.Value:
    one, two = (s.quantized(s.op("Mul", s.x, s.float(factor)), UINT8, 0.05, 128) for factor in (0.5, 0.3))
    y = s.op(
        "QLinearAdd",
        one,
        s.float(0.05),
        point(s, 128, UINT8),
        two,
        s.float(0.05),
        point(s, 128, UINT8),
        s.float(0.1),
        point(s, 128, UINT8),
        name="gemm",
        domain=MICROSOFT,
    )
    return s.op("DequantizeLinear", y, s.float(0.1), point(s, 128, UINT8))


def named(
    name: str, build: Callable[[Sketch], ir.Value], shape: tuple[int | str, ...] = ("batch", TOKENS, K), **more: Any
) -> Form:
    return Form(name, build, shape, dtype=more.pop("dtype", F32), **more)


OPERATORS = (
    named("QLinearMatMul, uint8 x int8", lambda s: product(s, UINT8, INT8, 128)),
    named("QLinearMatMul, int8 x int8", lambda s: product(s, INT8, INT8, 0)),
    named("QLinearMatMul, int8 x uint8", lambda s: product(s, INT8, UINT8, 0)),
    named("QLinearMatMul, uint8 x uint8", lambda s: product(s, UINT8, UINT8, 0)),
    named("MatMulInteger", integers), named("MatMulInteger in fp16", integers, dtype=F16, only="trt-rtx"),
    named("DynamicQuantizeLinear and MatMulInteger", lambda s: dynamic(s, INT8)),
    named("DynamicQuantizeLinear and MatMulInteger, uint8", lambda s: dynamic(s, UINT8)),
    named("DynamicQuantizeLinear, DQ and MatMul", dynamic_pair), named("DynamicQuantizeLinear alone", dynamic_alone),
    named("QLinearConv, uint8", lambda s: convolution(s, UINT8, 128), IMAGE), named("QLinearConv, int8", lambda s: convolution(s, INT8, 0), IMAGE),
    named("ConvInteger", integer_convolution, IMAGE),
    named("MatMulNBits", blocks), named("MatMulNBits in fp16", blocks, dtype=F16),
    named("MatMulBnb4", bnb4), named("GatherBlockQuantized", embedding), named("MatMulIntegerToFloat", to_float),
    named("DynamicQuantizeMatMul", lambda s: s.op("DynamicQuantizeMatMul", s.x, s.codes((K, N), INT8), s.float(0.01), point(s, 0, INT8), name="gemm", domain=MICROSOFT)),
    named("QGemm", lambda s: s.op("QGemm", s.quantized(s.x, UINT8, 0.05, 128), s.float(0.05), point(s, 128, UINT8), s.codes((K, N), INT8), s.float(0.01), point(s, 0, INT8), name="gemm", domain=MICROSOFT), FLAT),
    named("QAttention", attention), named("QLinearAdd", addition),
)  # fmt: skip
