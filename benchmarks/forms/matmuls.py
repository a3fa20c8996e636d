"""MatMul with both operands quantized: types, scales, zero points."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx_ir as ir

from .sketch import BF16, E5M2, F16, F32, FP8, INT4, INT8, INT16, TOKENS, UINT8, UINT16, Form, K, N, Sketch

FLAT = ("batch", K)
SQUARE = ("batch", 16, 16)
ZEROS = {UINT8: 128, UINT16: 32768}


def pair(left: np.dtype, right: np.dtype) -> Form:
    """MatMul of two types."""
    one, two = ZEROS.get(left, 0), ZEROS.get(right, 0)
    return Form(
        f"{left} x {right}",
        lambda s: s.matmul(s.activation(s.x, left, zero=one), s.weight(kind=right, zero=two, axis=1)),
        trap=left == INT4 and right in (INT4, INT8),
    )


def stepped(step: float, weight: float = 0.01) -> Form:
    return Form(
        f"scales of {step} and {weight}", lambda s: s.matmul(s.activation(s.x, scale=step), s.weight(step=weight, axis=1))
    )


def table(s: Sketch, *, factored: bool, kind: np.dtype = INT8, zero: int = 0) -> ir.Value:
    """A scale for each timestep, read from a table."""
    steps, index = np.asarray([0.02, 0.05]), s.op("Squeeze", s.t)
    if not factored:
        return s.matmul(s.activation(s.x, kind, s.op("Gather", s.float(steps), index, axis=0), zero), s.weight(kind=kind, axis=1))
    before, after = (s.op("Gather", s.float(values), index, axis=0) for values in (0.05 / steps, steps / 0.05))
    return s.op("Mul", s.matmul(s.activation(s.op("Mul", s.x, before), kind), s.weight(kind=kind, axis=1)), after)


def dynamic(s: Sketch, kind: np.dtype) -> ir.Value:
    """A scale for each token, factored out."""
    largest = s.op("ReduceMax", s.op("Abs", s.x), s.constant([-1]), keepdims=1)
    x = s.activation(s.op("Div", s.x, largest), kind, 1 / 127 if kind == INT8 else 1 / 448)
    return s.op("Mul", s.matmul(x, s.weight(kind=kind, axis=1)), largest)


def run_time(s: Sketch, zero: int, kind: np.dtype) -> ir.Value:
    """A scale for the whole tensor, computed from it."""
    largest = s.op("ReduceMax", s.op("Abs", s.x), s.constant([0, 1, 2]), keepdims=0)
    return s.matmul(s.activation(s.x, kind, s.op("Div", largest, s.float(127)), zero), s.weight(axis=1))


def unequal(s: Sketch, kind: np.dtype, scales: tuple[float, float], zeros: tuple[int, int]) -> ir.Value:
    """QuantizeLinear and DequantizeLinear that differ."""
    codes = s.op("QuantizeLinear", s.x, s.float(scales[0]), s.constant(zeros[0], kind))
    return s.matmul(s.op("DequantizeLinear", codes, s.float(scales[1]), s.constant(zeros[1], kind)), s.weight(axis=1))


def shared(s: Sketch, kind: np.dtype, zero: int, *, dequantizers: int, points: str = "qd") -> ir.Value:
    """One QuantizeLinear for two GEMMs."""
    step, point = s.float(0.05), s.constant(zero, kind)
    codes = s.op("QuantizeLinear", s.x, step, *((point,) if "q" in points else ()))
    values = [s.op("DequantizeLinear", codes, step, *((point,) if "d" in points else ())) for _ in range(dequantizers)]
    return s.op("Add", s.matmul(values[0], s.weight(axis=1)), s.matmul(values[-1], s.weight(axis=1), "other"))


def read_twice(s: Sketch, kind: np.dtype, zero: int) -> ir.Value:
    x = s.activation(s.x, kind, zero=zero)
    return s.op("Add", s.matmul(x, s.weight(axis=1)), x)


def itself(s: Sketch, kind: np.dtype, zero: int) -> ir.Value:
    x = s.activation(s.x, kind, zero=zero)
    return s.matmul(x, x)


def half_scale(s: Sketch, *, weight: bool) -> ir.Value:
    """One scale of another float type than the graph's."""
    other = np.float16 if s.dtype == F32 else np.float32
    step, point = s.constant(0.05 if not weight else np.full(N, 0.01), other), s.constant(np.zeros(N if weight else ()), INT8)
    if weight:
        return s.matmul(s.activation(s.x), s.op("DequantizeLinear", s.codes((K, N), INT8), step, point, axis=1))
    return s.matmul(s.op("DequantizeLinear", s.op("QuantizeLinear", s.x, step, point), step, point), s.weight(axis=1))


MATMULS = (
    Form("int8, a scale an output channel", lambda s: s.op("Add", s.plain(), s.float(np.ones(N)))),
    Form("the same in fp32", lambda s: s.plain(), dtype=F32, only="trt-rtx"),
    Form("the same in fp16", lambda s: s.plain(), dtype=F16, only="ort"),
    Form("the same in bf16", lambda s: s.plain(), dtype=BF16),
    Form("uint8 in fp16", lambda s: s.plain(kind=UINT8, zero=128), dtype=F16, only="ort"),
    *(pair(left, right) for left, right in product((INT8, UINT8, INT16, UINT16, INT4, FP8), (INT8, UINT8, INT4, INT16, FP8))),
    Form("fp8 in fp32", lambda s: s.matmul(s.activation(s.x, FP8), s.weight(kind=FP8, axis=1)), dtype=F32),
    Form("fp8 in fp16", lambda s: s.matmul(s.activation(s.x, FP8), s.weight(kind=FP8, axis=1)), dtype=F16, only="ort"),
    Form("fp8, one scale", lambda s: s.matmul(s.activation(s.x, FP8), s.weight(kind=FP8, scale=()))),
    Form("float8 e5m2 of both", lambda s: s.matmul(s.activation(s.x, E5M2), s.weight(kind=E5M2, scale=()))),
    Form("uint8 codes, zero point 0", lambda s: s.plain(kind=UINT8), trap=True),
    Form("uint8 codes, no zero point", lambda s: s.plain(kind=UINT8, points=""), trap=True),
    Form("uint8 codes, zero point 0 of the DequantizeLinear alone", lambda s: s.plain(kind=UINT8, points="d"), trap=True),
    Form("uint8 codes, zero point 128 of the QuantizeLinear alone", lambda s: s.plain(kind=UINT8, zero=128, points="q")),
    Form("zero point 3 of the activation", lambda s: s.plain(zero=3)),
    Form("zero point 3 of the weight", lambda s: s.matmul(s.activation(s.x), s.weight(zero=3, axis=1))),
    Form("int8, zero point of the QuantizeLinear alone", lambda s: s.plain(points="q")),
    Form("int8, no zero point but output_dtype", lambda s: s.plain(points="", output_dtype=3)),
    Form("int8, zero point of the DequantizeLinear alone", lambda s: s.plain(points="d", output_dtype=3)),
    Form("int8, zero point and output_dtype", lambda s: s.plain(output_dtype=3)),
    Form("uint8, zero point and output_dtype", lambda s: s.plain(kind=UINT8, zero=128, output_dtype=2)),
    Form("weight without a zero point", lambda s: s.matmul(s.activation(s.x), s.weight(point=False, axis=1))),
    Form("uint8 and a weight without a zero point", lambda s: s.matmul(s.activation(s.x, UINT8, zero=128), s.weight(point=False, axis=1))),
    Form("int8, one scale", lambda s: s.matmul(s.activation(s.x), s.weight(scale=()))),
    Form("int8, one scale of rank 1", lambda s: s.matmul(s.activation(s.x), s.weight(scale=(1,)))),
    Form("activation scale of rank 1", lambda s: s.plain(scale=[0.05])),
    Form("activation scale a channel", lambda s: s.plain(scale=np.linspace(0.04, 0.06, K), axis=2)),
    Form("activation scale a channel, uint8", lambda s: s.plain(kind=UINT8, zero=128, scale=np.linspace(0.04, 0.06, K), axis=2)),
    Form("activation scale a token", lambda s: s.plain(scale=np.linspace(0.04, 0.06, TOKENS), axis=1)),
    Form("activation scale a token, uint8", lambda s: s.plain(kind=UINT8, zero=128, scale=np.linspace(0.04, 0.06, TOKENS), axis=1)),
    Form("activation scale a row, rank 2", lambda s: s.plain(scale=np.linspace(0.04, 0.06, TOKENS), axis=0), (TOKENS, K)),
    Form("activation scale a channel, rank 2", lambda s: s.plain(scale=np.linspace(0.04, 0.06, K), axis=1), (TOKENS, K)),
    Form("activation scale a channel, fp8", lambda s: s.matmul(s.activation(s.x, FP8, np.full(K, 0.05), axis=2), s.weight(kind=FP8, axis=1)), only="trt-rtx"),
    Form("weight scale along the input", lambda s: s.matmul(s.activation(s.x), s.weight(axis=0))),
    Form("weight scale along the input, uint8", lambda s: s.matmul(s.activation(s.x, UINT8, zero=128), s.weight(axis=0))),
    Form("weight scale along the input, not square", lambda s: s.matmul(s.activation(s.x), s.weight((K, 64), scale=(K,), axis=0))),
    Form("127 scales for 128 channels", lambda s: s.matmul(s.activation(s.x), s.weight(scale=(127,), axis=1))),
    stepped(0.0), stepped(-0.05), stepped(0.05, -0.01), stepped(float("nan")),
    Form("activation scale of another float type", lambda s: half_scale(s, weight=False)),
    Form("weight scale of another float type", lambda s: half_scale(s, weight=True)),
    Form("scale from a table, direct", lambda s: table(s, factored=False)),
    Form("scale from a table, direct, uint8", lambda s: table(s, factored=False, kind=UINT8, zero=128), only="ort"),
    Form("scale from a table, direct, fp8", lambda s: table(s, factored=False, kind=FP8), only="trt-rtx"),
    Form("scale from a table, factored", lambda s: table(s, factored=True)),
    Form("scale from a table, factored, fp8", lambda s: table(s, factored=True, kind=FP8), only="trt-rtx"),
    Form("dynamic, a scale a token, factored", lambda s: dynamic(s, INT8)),
    Form("dynamic, the same in fp8", lambda s: dynamic(s, FP8), only="trt-rtx"),
    Form("dynamic, a scale a tensor", lambda s: run_time(s, 0, INT8)),
    Form("dynamic, a scale a tensor, uint8", lambda s: run_time(s, 128, UINT8), only="ort"),
    Form("scale from arithmetic on constants", lambda s: s.matmul(s.activation(s.x, scale=s.op("Div", s.float(1.0), s.float(20.0))), s.weight(axis=1))),
    Form("Mul by a channel's constant before Q", lambda s: s.matmul(s.activation(s.op("Mul", s.x, s.float(np.linspace(0.5, 2, K)))), s.weight(axis=1))),
    Form("scales of Q and DQ that differ", lambda s: unequal(s, INT8, (0.05, 0.06), (0, 0))),
    Form("zero points of Q and DQ that differ", lambda s: unequal(s, INT8, (0.05, 0.05), (0, 3))),
    Form("zero points of Q and DQ that differ, uint8", lambda s: unequal(s, UINT8, (0.05, 0.05), (128, 120))),
    Form("one Q, one DQ, two GEMMs", lambda s: shared(s, INT8, 0, dequantizers=1)),
    Form("one Q, one DQ without a zero point, two GEMMs", lambda s: shared(s, INT8, 0, dequantizers=1, points="q")),
    Form("one Q, two DQs", lambda s: shared(s, INT8, 0, dequantizers=2)),
    Form("one Q, one DQ, two GEMMs, uint8", lambda s: shared(s, UINT8, 128, dequantizers=1)),
    Form("one Q, two DQs, uint8", lambda s: shared(s, UINT8, 128, dequantizers=2)),
    Form("a DQ that a GEMM and an Add read", lambda s: read_twice(s, INT8, 0)),
    Form("a DQ that a GEMM and an Add read, uint8", lambda s: read_twice(s, UINT8, 128)),
    Form("x @ x", lambda s: itself(s, INT8, 0), SQUARE),
    Form("x @ x, uint8", lambda s: itself(s, UINT8, 128), SQUARE),
    Form("int8 activation only", lambda s: s.matmul(s.activation(s.x), s.noise(K, N))),
    Form("uint8 activation only", lambda s: s.matmul(s.activation(s.x, UINT8, zero=128), s.noise(K, N))),
    Form("fp8 activation only", lambda s: s.matmul(s.activation(s.x, FP8), s.noise(K, N))),
    Form("input of rank 2", lambda s: s.plain(), FLAT),
    Form("input of rank 4", lambda s: s.plain(), ("batch", 2, TOKENS, K)),
    Form("input of rank 1", lambda s: s.plain(), (K,)),
)  # fmt: skip
