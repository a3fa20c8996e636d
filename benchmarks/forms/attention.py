"""Attention's products, and GEMMs whose result is cut into queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from .sketch import FP8, INT8, UINT8, UINT16, Form, K, N, Sketch


def attend(s: Sketch, q: ir.Value, k: ir.Value, v: ir.Value, turn: list[int]) -> ir.Value:
    """Attention on floats."""
    scores = s.op("Softmax", s.matmul(q, s.op("Transpose", k, perm=turn), "scores"), axis=-1)
    result = s.matmul(scores, v, "values")
    if len(turn) == 3:
        return result
    return s.op("Reshape", s.op("Transpose", result, perm=[0, 2, 1, 3]), s.constant([0, 0, N]))


def thirds(s: Sketch, y: ir.Value, heads: int = 2) -> ir.Value:
    """Split and attend; with 0 heads, nothing is reshaped."""
    parts = s.several("Split", y, outputs=3, axis=2, num_outputs=3)
    if not heads:
        return attend(s, *parts, turn=[0, 2, 1])
    split = [s.op("Reshape", part, s.constant([0, 0, heads, N // heads])) for part in parts]
    return attend(s, *(s.op("Transpose", part, perm=[0, 2, 1, 3]) for part in split), turn=[0, 1, 3, 2])


def fused(kind: np.dtype = INT8, scale: tuple[int, ...] = (3 * N,), heads: int = 2, *, floats: bool = False) -> Any:
    """One GEMM for q, k and v."""

    def build(s: Sketch) -> ir.Value:
        attributes: dict[str, Any] = {"axis": 1} if scale else {}
        weight = (
            s.activation(s.noise(K, 3 * N), kind, np.full(scale, 0.01), **attributes)
            if floats
            else s.weight((K, 3 * N), kind, scale, **attributes)
        )
        y = s.matmul(s.activation(s.x, kind), weight)
        return thirds(s, s.op("Add", y, s.noise(3 * N)), heads)

    return build


def factored(s: Sketch) -> ir.Value:
    """One GEMM for q, k and v, and a factor of the timestep behind it."""
    index = s.op("Squeeze", s.t)
    before, after = (s.op("Gather", s.float(values), index, axis=0) for values in ([2.5, 1.0], [0.4, 1.0]))
    y = s.matmul(s.activation(s.op("Mul", s.x, before)), s.weight((K, 3 * N), scale=(3 * N,), axis=1))
    return thirds(s, s.op("Mul", y, after))


def gathered(s: Sketch) -> ir.Value:
    """q, k and v as timm takes them apart: Reshape, Transpose, three Gathers."""
    y = s.matmul(s.activation(s.x), s.weight((K, 3 * N), scale=(3 * N,), axis=1))
    transposed = s.op("Transpose", s.op("Reshape", y, s.constant([0, 0, 3, 2, N // 2])), perm=[2, 0, 3, 1, 4])
    q, k, v = (s.op("Gather", transposed, s.constant(index), axis=0) for index in range(3))
    return attend(s, q, k, v, turn=[0, 1, 3, 2])


def products(kind: np.dtype, zero: int, **more: Any) -> Iterator[Form]:
    """Products of two activations."""
    text = f"{kind}{', opset 19' if more.get('opset') == 19 else ''}"

    def quantized(s: Sketch, x: ir.Value, scale: float = 0.05) -> ir.Value:
        return s.activation(x, kind, scale, zero)

    def transposed(s: Sketch) -> ir.Value:
        return s.op("Transpose", s.op("Mul", s.x, s.float(2.0)), perm=[0, 2, 1])

    def whole(s: Sketch) -> ir.Value:
        q, k, v = (quantized(s, s.op("Mul", s.x, s.float(factor))) for factor in (1.0, 2.0, 3.0))
        scores = s.op("Softmax", s.matmul(q, s.op("Transpose", k, perm=[0, 2, 1]), "scores"), axis=-1)
        return s.matmul(s.activation(scores, kind, 1 / 448 if kind == FP8 else 1 / 127, zero), v)

    yield Form(f"attention, {text}", whole, **more)
    yield Form(f"scores, Transpose before Q, {text}", lambda s: s.matmul(quantized(s, s.x), quantized(s, transposed(s))), **more)
    yield Form(f"scores, keys in float, {text}", lambda s: s.matmul(quantized(s, s.x), transposed(s)), **more)
    yield Form(f"scores, queries in float, {text}", lambda s: s.matmul(s.x, quantized(s, transposed(s))), **more)
    yield Form(
        f"scores, a scale a key, {text}",
        lambda s: s.matmul(quantized(s, s.x), s.activation(transposed(s), kind, np.linspace(0.04, 0.06, 16), zero, axis=2)),
        **more,
    )


def operator(s: Sketch, kind: np.dtype, zero: int) -> ir.Value:
    """ONNX's own Attention."""
    q, k, v = (s.activation(s.op("Mul", s.x, s.float(factor)), kind, zero=zero) for factor in (1.0, 2.0, 3.0))
    return s.op("Attention", q, k, v, name="gemm", q_num_heads=2, kv_num_heads=2)


ATTENTION = (
    Form("one GEMM for q, k and v, a scale a channel", fused()),
    Form("one GEMM for q, k and v, one scale", fused(scale=())),
    Form("one GEMM for q, k and v, float + Q + DQ", fused(floats=True)),
    Form("one GEMM for q, k and v, fp8", fused(FP8), only="trt-rtx"),
    Form("one GEMM for q, k and v, fp8, one scale", fused(FP8, ()), only="trt-rtx"),
    Form("one GEMM for q, k and v, a factor behind", factored),
    Form("one GEMM for q, k and v, taken apart by Gathers", gathered),
    Form("one GEMM for three, nothing reshaped", fused(heads=0)),
    *products(INT8, 0), *products(INT8, 0, opset=19), *products(UINT8, 128), *products(FP8, 0),
    *products(UINT16, 32768, only="ort"),
    Form("Attention, int8", lambda s: operator(s, INT8, 0), opset=23),
    Form("Attention, uint8", lambda s: operator(s, UINT8, 128), opset=23),
)  # fmt: skip
