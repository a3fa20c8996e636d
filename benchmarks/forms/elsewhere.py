"""QuantizeLinear and DequantizeLinear that no GEMM reads; the judged operator is still called `gemm`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from .sketch import E5M2, FP8, INT4, INT8, INT16, INT32, UINT8, Form, K, N, Sketch

PICTURE = ("batch", 4, 8, 8)
UNARY: tuple[tuple[str, dict[str, Any], tuple[int | str, ...]], ...] = (
    ("Softmax", {"axis": -1}, ("batch", 16, K)),
    ("Sigmoid", {}, ("batch", 16, K)),
    ("LeakyRelu", {}, ("batch", 16, K)),
    ("Gelu", {}, ("batch", 16, K)),
    ("Relu", {}, ("batch", 16, K)),
    ("Erf", {}, ("batch", 16, K)),
    ("MaxPool", {"kernel_shape": [2, 2]}, PICTURE),
    ("AveragePool", {"kernel_shape": [2, 2]}, PICTURE),
    ("GlobalAveragePool", {}, PICTURE),
)


def forms(kind: np.dtype, zero: int) -> Iterator[Form]:
    def quantized(s: Sketch, x: ir.Value, scale: float = 0.05) -> ir.Value:
        return s.activation(x, kind, scale, zero)

    def two(s: Sketch) -> tuple[ir.Value, ir.Value]:
        return quantized(s, s.x), quantized(s, s.op("Mul", s.x, s.float(0.7)), 0.06)

    def unary(operator: str, shape: tuple[int | str, ...], attributes: dict[str, Any]) -> Iterator[Form]:
        yield Form(
            f"{operator} between DQ and Q, {kind}",
            lambda s: quantized(s, s.op(operator, quantized(s, s.x), name="gemm", **attributes)),
            shape,
        )
        yield Form(
            f"{operator} behind DQ, {kind}",
            lambda s: s.op("Neg", s.op(operator, quantized(s, s.x), name="gemm", **attributes)),
            shape,
        )

    for operator, attributes, shape in UNARY:
        yield from unary(operator, shape, attributes)
    for operator in ("Add", "Mul", "Sub"):
        yield Form(
            f"{operator} between DQ and Q, {kind}",
            lambda s, operator=operator: quantized(s, s.op(operator, *two(s), name="gemm"), 0.1),
        )
        yield Form(f"{operator} behind DQ, {kind}", lambda s, operator=operator: s.op(operator, *two(s), name="gemm"))
        yield Form(
            f"{operator} of DQ and float, then Q, {kind}",
            lambda s, operator=operator: quantized(s, s.op(operator, quantized(s, s.x), s.noise(K), name="gemm"), 0.1),
        )
    yield Form(f"Concat between DQ and Q, {kind}", lambda s: quantized(s, s.op("Concat", *two(s), axis=1, name="gemm")))
    yield Form(
        f"Where between DQ and Q, {kind}",
        lambda s: quantized(s, s.op("Where", s.op("Greater", s.x, s.float(0.0)), *two(s), name="gemm")),
    )
    yield Form(
        f"Transpose between DQ and Q, {kind}",
        lambda s: quantized(s, s.op("Transpose", quantized(s, s.x), perm=[0, 2, 1], name="gemm")),
    )
    yield Form(
        f"Reshape between DQ and Q, {kind}",
        lambda s: quantized(s, s.op("Reshape", quantized(s, s.x), s.constant([0, 8, 2 * K]), name="gemm")),
    )
    yield Form(
        f"LayerNormalization between DQ and Q, {kind}",
        lambda s: quantized(
            s, s.op("LayerNormalization", quantized(s, s.x), s.float(np.ones(K)), s.float(np.zeros(K)), axis=-1, name="gemm")
        ),
    )
    yield Form(
        f"LayerNormalization between GEMM's Q and DQ, {kind}",
        lambda s: s.matmul(
            quantized(
                s, s.op("LayerNormalization", quantized(s, s.op("Neg", s.x)), s.float(np.ones(K)), s.float(np.zeros(K)), axis=-1)
            ),
            s.weight(axis=1),
        ),
    )
    yield Form(f"Q and DQ alone, {kind}", lambda s: quantized(s, s.x))


def beside(name: str, pair: Any, **more: Any) -> Form:
    """A good GEMM, and a pair that only an Add reads."""
    return Form(f"a GEMM, and at an Add {name}", lambda s: s.op("Add", s.plain(), pair(s)), **more)


ELSEWHERE = (
    *forms(INT8, 0), *(replace(form, only="ort") for form in forms(UINT8, 128)),
    beside("int8", lambda s: s.activation(s.op("Neg", s.x))),
    beside("uint8 of zero point 0", lambda s: s.activation(s.op("Neg", s.x), UINT8), trap=True),
    beside("uint8 of zero point 128", lambda s: s.activation(s.op("Neg", s.x), UINT8, zero=128)),
    beside("int8 of zero point 3", lambda s: s.activation(s.op("Neg", s.x), zero=3)),
    beside("fp8", lambda s: s.activation(s.op("Neg", s.x), FP8)),
    beside("float8 e5m2", lambda s: s.activation(s.op("Neg", s.x), E5M2)),
    beside("int16", lambda s: s.activation(s.op("Neg", s.x), INT16)),
    beside("int4", lambda s: s.activation(s.op("Neg", s.x), INT4), trap=True),
    beside("a scale a channel", lambda s: s.activation(s.op("Neg", s.x), scale=np.full(K, 0.05), axis=2)),
    beside("a scale of 0", lambda s: s.activation(s.op("Neg", s.x), scale=0.0)),
    beside("an int32 bias", lambda s: s.bias()),
    beside("an int8 constant", lambda s: s.op("DequantizeLinear", s.codes((N,), INT8), s.float(0.01), s.constant(0, INT8))),
    beside("a gathered int8 table", lambda s: s.op("Gather", s.weight((99, N), scale=()), s.constant(np.arange(16)))),
    beside("codes as they are", lambda s: s.op("Cast", s.quantized(s.op("Neg", s.x)), to=s.dtype.value)),
    beside("codes as they are, of zero point 3", lambda s: s.op("Cast", s.quantized(s.op("Neg", s.x), zero=3), to=s.dtype.value)),
    beside("codes as they are, of uint8 and zero point 128", lambda s: s.op("Cast", s.quantized(s.op("Neg", s.x), UINT8, zero=128), to=s.dtype.value)),
    beside("int32 codes of zero point 0", lambda s: s.op("DequantizeLinear", s.constant(s.random.integers(-9, 9, (16, N)), INT32), s.float(0.01))),
)  # fmt: skip
