"""What stands behind a MatMul or Gemm: QuantizeLinear, Relu, Clip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from .sketch import INT8, UINT8, Form, K, N, Sketch

FLAT = ("batch", K)


def gemm(s: Sketch, left: ir.Value, *bias: ir.Value, right: ir.Value | None = None) -> ir.Value:
    return s.op("Gemm", left, s.weight(axis=0) if right is None else right, *bias, transB=1, name="gemm")


def two_dequantizers(s: Sketch, y: ir.Value, kind: np.dtype, zero: int) -> ir.Value:
    """One QuantizeLinear behind, two DequantizeLinears."""
    step, point = s.float(0.3), s.constant(zero, kind)
    codes = s.op("QuantizeLinear", y, step, point)
    first, second = (s.op("DequantizeLinear", codes, step, point) for _ in range(2))
    return s.op("Add", s.op("Neg", first), s.op("Mul", second, s.float(3.0)))


def forms(kind: np.dtype, zero: int) -> Iterator[Form]:
    other, other_zero = (UINT8, 128) if kind == INT8 else (INT8, 0)
    low = zero - 128

    def x(s: Sketch) -> ir.Value:
        return s.activation(s.x, kind, zero=zero)

    def y(s: Sketch) -> ir.Value:
        return s.plain(kind=kind, zero=zero)

    def out(s: Sketch, value: ir.Value, **attributes: Any) -> ir.Value:
        return s.activation(value, **{"kind": kind, "scale": 0.3, "zero": zero, **attributes})

    def quantized_and_read(s: Sketch) -> ir.Value:
        value = y(s)
        return s.op("Add", out(s, value), value)

    def relu_twice(s: Sketch) -> ir.Value:
        value = s.op("Relu", y(s))
        return s.op("Add", s.op("Neg", value), s.op("Mul", value, s.float(3.0)))

    def clip(s: Sketch, small: float, large: float) -> ir.Value:
        return out(s, s.op("Clip", y(s), s.float(small), s.float(large)))

    def name(text: str) -> str:
        return f"{kind}: {text}"

    yield Form(name("result quantized"), lambda s: out(s, y(s)))
    yield Form(name("result quantized as the other type"), lambda s: out(s, y(s), kind=other, zero=other_zero))
    yield Form(name("result quantized and read"), quantized_and_read)
    yield Form(name("result quantized a channel"), lambda s: out(s, y(s), scale=np.full(N, 0.3), axis=2))
    yield Form(name("result quantized, two DQs"), lambda s: two_dequantizers(s, y(s), kind, zero))
    yield Form(name("result quantized as the other type, two DQs"), lambda s: two_dequantizers(s, y(s), other, other_zero))
    yield Form(name("Add, then quantized"), lambda s: out(s, s.op("Add", y(s), s.noise(N))))
    yield Form(name("Add, then quantized, rank 2"), lambda s: out(s, s.op("Add", y(s), s.noise(N))), FLAT)
    yield Form(name("Add of x, then quantized, rank 2"), lambda s: out(s, s.op("Add", y(s), s.x)), FLAT)
    yield Form(name("Add, then quantized, fixed rank 3"), lambda s: out(s, s.op("Add", y(s), s.noise(N))), (2, 16, K))
    yield Form(name("Add of an int32 bias, then quantized, rank 2"), lambda s: out(s, s.op("Add", y(s), s.bias())), FLAT)
    yield Form(name("Relu, the graph's result"), lambda s: s.op("Relu", y(s)))
    yield Form(name("Relu, then Neg"), lambda s: s.op("Neg", s.op("Relu", y(s))))
    yield Form(name("Relu, read twice"), relu_twice)
    yield Form(name("Relu, then quantized"), lambda s: out(s, s.op("Relu", y(s)), zero=low))
    yield Form(name("Relu, then quantized around 0"), lambda s: out(s, s.op("Relu", y(s)), scale=0.1))
    yield Form(name("Clip, then Neg"), lambda s: s.op("Neg", s.op("Clip", y(s), s.float(-9.0), s.float(9.0))))
    yield Form(name("Clip wider than the codes, then quantized"), lambda s: clip(s, -99.0, 99.0))
    yield Form(name("Clip narrower than the codes, then quantized"), lambda s: clip(s, -3.0, 3.0))
    yield Form(name("Gemm, result quantized"), lambda s: out(s, gemm(s, x(s))), FLAT)
    yield Form(name("Gemm, int32 bias, result quantized"), lambda s: out(s, gemm(s, x(s), s.bias())), FLAT)
    yield Form(name("Gemm, float bias, result quantized"), lambda s: out(s, gemm(s, x(s), s.noise(N))), FLAT)
    yield Form(name("Gemm, float weight, result quantized"), lambda s: out(s, gemm(s, x(s), right=s.noise(N, K))), FLAT)
    yield Form(
        name("Gemm, result quantized as the other type"),
        lambda s: out(s, gemm(s, x(s), s.bias()), kind=other, zero=other_zero),
        FLAT,
    )
    yield Form(name("Gemm, then Relu and Neg"), lambda s: s.op("Neg", s.op("Relu", gemm(s, x(s)))), FLAT)
    yield Form(name("Gemm, then Relu, the graph's result"), lambda s: s.op("Relu", gemm(s, x(s))), FLAT)
    yield Form(name("MatMul, float weight, result quantized"), lambda s: out(s, s.matmul(x(s), s.noise(K, N))))


RESULTS = (*forms(INT8, 0), *(replace(form, only="ort") for form in forms(UINT8, 128)))
