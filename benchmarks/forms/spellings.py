"""One graph, spelled in other ways: constants, views, axes, opsets, bodies, functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from .sketch import B64, INT4, INT8, MICROSOFT, UINT8, Form, K, N, Sketch

Make = Callable[[Sketch], ir.Value]


def parameters(s: Sketch, step: ir.Value, point: ir.Value, **attributes: Any) -> ir.Value:
    """A MatMul whose activation has this scale and zero point."""
    codes = s.op("QuantizeLinear", s.x, step, point, **attributes)
    return s.matmul(s.op("DequantizeLinear", codes, step, point, **attributes), s.weight(axis=1))


def constants(s: Sketch) -> ir.Value:
    """Scale and zero point as Constant nodes."""
    step, point = (ir.tensor(np.asarray(value, dtype=kind)) for value, kind in ((0.05, s.dtype.numpy()), (0, INT8)))
    return parameters(s, s.op("Constant", value=step), s.op("Constant", value=point))


def identities(s: Sketch) -> ir.Value:
    """Identities everywhere."""

    def same(value: ir.Value) -> ir.Value:
        return s.op("Identity", s.op("Identity", value))

    step, point = same(s.float(0.05)), same(s.constant(0, INT8))
    codes = same(s.op("QuantizeLinear", same(s.x), step, point))
    return s.matmul(same(s.op("DequantizeLinear", codes, step, point)), same(s.weight(axis=1)))


def cast_codes(s: Sketch) -> ir.Value:
    """Codes and zero points as int32 and a Cast."""
    codes, points = (s.op("Cast", s.constant(value, np.int32), to=3) for value in (s.random.integers(-9, 9, (K, N)), np.zeros(N)))
    return s.matmul(s.activation(s.x), s.op("DequantizeLinear", codes, s.float(np.full(N, 0.01)), points, axis=1))


def viewed(view: str, kind: np.dtype, zero: int, *, before: bool, opset: int) -> Form:
    """A view between Q and DQ, or between DQ and MatMul."""

    def change(s: Sketch, value: ir.Value) -> ir.Value:
        if view == "Transpose":
            return s.op(view, value, perm=[0, 2, 1])
        if view == "Reshape":
            return s.op(view, value, s.constant([0, 8, 2 * K]))
        if view == "Unsqueeze":
            return s.op(view, value, s.constant([1]))
        if view == "Squeeze":
            return s.op(view, s.op("Unsqueeze", value, s.constant([1])), s.constant([1]))
        return s.op(view, value, axis=2)

    def build(s: Sketch) -> ir.Value:
        width = {"Reshape": 2 * K, "Transpose": 16}.get(view, K)
        weight = s.weight((width, N), axis=1)
        if before:
            return s.matmul(s.activation(s.x, kind, zero=zero, between=lambda codes: change(s, codes)), weight)
        return s.matmul(change(s, s.activation(s.x, kind, zero=zero)), weight)

    only = "ort" if kind == UINT8 or opset == 19 else ""
    return Form(f"{view} {'between Q and DQ' if before else 'behind DQ'}, {kind}, opset {opset}", build, opset=opset, only=only)


def branch(inner: Callable[[Sketch, ir.Value], ir.Value], outer: Make | None = None) -> Make:
    """`inner` in one branch of an If; `outer` stands before it."""

    def build(s: Sketch) -> ir.Value:
        before = outer(s) if outer else s.x
        condition = s.op("Greater", s.op("ReduceMax", s.x, keepdims=0), s.float(-99.0))
        body = s.body("then", (), lambda b: [inner(b, before)])
        other = s.body("other", (), lambda b: [b.matmul(s.x, b.noise(K, N), "float")])
        return s.op("If", condition, then_branch=body, else_branch=other)

    return build


def loop(kind: np.dtype, zero: int) -> Make:
    def build(s: Sketch) -> ir.Value:
        step, condition = (
            ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(kind))
            for name, kind in (("i", ir.DataType.INT64), ("going", ir.DataType.BOOL))
        )
        value = ir.Value(name="v", shape=s.x.shape, type=ir.TensorType(s.dtype))
        body = s.body(
            "loop",
            [step, condition, value],
            lambda b: [b.op("Identity", condition), b.matmul(b.activation(value, kind, zero=zero), b.weight(axis=1))],
        )
        return s.op("Loop", s.constant(1), s.constant(True), s.x, body=body)

    return build


def scan(s: Sketch, *, quantized: bool) -> ir.Value:
    value = ir.Value(name="v", shape=ir.Shape([16, K]), type=ir.TensorType(s.dtype))
    body = s.body(
        "scan",
        [value],
        lambda b: [
            b.matmul(
                b.activation(value, UINT8, zero=128) if quantized else value, b.weight(axis=1) if quantized else b.noise(K, N)
            )
        ],
    )
    return s.op("Scan", s.x, body=body, num_scan_inputs=1)


def functions(s: Sketch, kind: np.dtype, zero: int, *, twice: bool = False) -> ir.Value:
    """QuantizeLinear and DequantizeLinear in a function."""

    def pair(f: Sketch, x: ir.Value, step: ir.Value, point: ir.Value) -> ir.Value:
        return f.op("DequantizeLinear", f.op("QuantizeLinear", x, step, point, name="q"), step, point, name="dq")

    call = s.function("fake_quantize", 3, pair)
    if twice:
        first, second = (call(value, s.float(0.05), s.constant(zero, kind)) for value in (s.x, s.op("Neg", s.x)))
        return s.op("Add", s.matmul(first, s.weight(axis=1)), s.matmul(second, s.weight(axis=1), "other"))
    return s.matmul(call(s.x, s.float(0.05), s.constant(zero, kind)), s.weight(axis=1))


def one_name(s: Sketch) -> ir.Value:
    first, second = s.activation(s.x), s.activation(s.op("Neg", s.x))
    for node in s.nodes:
        node.name = {"QuantizeLinear": "q", "DequantizeLinear": "dq"}.get(node.op_type, node.name)
    return s.op("Add", s.matmul(first, s.weight(axis=1)), s.matmul(second, s.weight(axis=1), "other"))


def unnamed(s: Sketch) -> ir.Value:
    y = s.plain()
    for node in s.nodes:
        node.name = node.name if node.op_type == "MatMul" else None
    return y


def microsoft(s: Sketch, kind: np.dtype, zero: int) -> ir.Value:
    return s.matmul(s.activation(s.x, kind, zero=zero, domain=MICROSOFT), s.weight(axis=1))


def opsets() -> Iterator[Form]:
    yield Form("opset 10", lambda s: s.matmul(s.activation(s.x), s.weight(scale=())), opset=10, dtype=ir.DataType.FLOAT)
    for opset in (13, 19, 23, 24, 25):
        yield Form(f"opset {opset}", lambda s: s.plain(), opset=opset, dtype=ir.DataType.FLOAT if opset < 19 else None)


def einsum(s: Sketch, left: ir.Value, right: ir.Value, equation: str = "btk,kn->btn") -> ir.Value:
    return s.op("Einsum", left, right, equation=equation, name="gemm")


SPELLINGS = (
    Form("scale and zero point as Constants", constants),
    Form("scale as value_float", lambda s: parameters(s, s.op("Constant", value_float=0.05), s.constant(0, INT8)), dtype=ir.DataType.FLOAT),
    Form("scale as value_floats", lambda s: parameters(s, s.op("Constant", value_floats=[0.05]), s.constant([0], INT8)), dtype=ir.DataType.FLOAT),
    Form("zero point as value_int and a Cast", lambda s: parameters(s, s.float(0.05), s.op("Cast", s.op("Constant", value_int=0), to=3))),
    Form("zero point 3 as value_int and a Cast", lambda s: parameters(s, s.float(0.05), s.op("Cast", s.op("Constant", value_int=3), to=3))),
    Form("scale as a Cast of a constant", lambda s: parameters(s, s.op("Cast", s.constant(0.05, np.float64), to=s.dtype.value), s.constant(0, INT8))),
    Form("Identities everywhere", identities),
    Form("codes as int32 and a Cast", cast_codes),
    Form("weight axis -1", lambda s: s.matmul(s.activation(s.x), s.weight(axis=-1))),
    Form("weight axis -2", lambda s: s.matmul(s.activation(s.x), s.weight(axis=-2))),
    Form("weight axis not written", lambda s: s.matmul(s.activation(s.x), s.weight())),
    *(viewed(view, kind, zero, before=before, opset=opset) for view in ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten")
      for kind, zero in ((INT8, 0), (UINT8, 128)) for before in (True, False) for opset in (19, 21)
      if opset == 21 or view in ("Reshape", "Transpose")),
    Form("Cast to its own type behind DQ", lambda s: s.matmul(s.op("Cast", s.activation(s.x), to=s.dtype.value), s.weight(axis=1))),
    *opsets(),
    Form("Q and DQ of com.microsoft", lambda s: microsoft(s, INT8, 0)), Form("Q and DQ of com.microsoft, uint8", lambda s: microsoft(s, UINT8, 128)),
    Form("in a branch", branch(lambda b, x: b.matmul(b.activation(x), b.weight(axis=1)))),
    Form("in a branch, uint8", branch(lambda b, x: b.matmul(b.activation(x, UINT8, zero=128), b.weight(axis=1)))),
    Form("in a branch, DQ outside", branch(lambda b, x: b.matmul(x, b.weight(axis=1)), lambda s: s.activation(s.x))),
    Form("in a branch, the weight's DQ outside", branch(lambda b, w: b.matmul(b.activation(b.op("Mul", w, b.float(3.0))), w), lambda s: s.weight(axis=1)), (K, K)),
    Form("in a branch, int4 blocks", branch(lambda b, x: b.matmul(x, b.weight(kind=INT4, scale=(2, N), **B64)))),
    Form("in a loop", loop(INT8, 0)), Form("in a loop, uint8", loop(UINT8, 128)),
    Form("in a Scan", lambda s: scan(s, quantized=True)),
    Form("in a function", lambda s: functions(s, INT8, 0)), Form("in a function, uint8", lambda s: functions(s, UINT8, 128)),
    Form("in a function, called twice", lambda s: functions(s, INT8, 0, twice=True)),
    Form("two QuantizeLinears of one name", one_name), Form("nodes without names", unnamed),
    Form("Einsum, int8", lambda s: einsum(s, s.activation(s.x), s.weight(axis=1))),
    Form("Einsum, scales along the input", lambda s: einsum(s, s.activation(s.x), s.weight(axis=0))),
    Form("Einsum, uint8", lambda s: einsum(s, s.activation(s.x, UINT8, zero=128), s.weight(axis=1))),
    Form("Einsum, int8 weight only", lambda s: einsum(s, s.x, s.weight(axis=1))),
    Form("Einsum, int4 blocks", lambda s: einsum(s, s.x, s.weight(kind=INT4, scale=(2, N), **B64))),
    Form("Einsum, two activations", lambda s: einsum(s, s.activation(s.x), s.activation(s.op("Neg", s.x)), "bqd,bkd->bqk")),
)  # fmt: skip
