"""Conv and ConvTranspose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from .sketch import FP8, INT4, INT8, UINT8, UINT16, Form, Sketch

IMAGE = ("batch", 16, 16, 8)
KERNEL = (32, 16, 2, 2)
CHANNELS: dict[str, Any] = {"shape": KERNEL, "scale": (32,), "axis": 0}


def conv(s: Sketch, left: ir.Value, right: ir.Value, *bias: ir.Value, **attributes: Any) -> ir.Value:
    return s.op("Conv", left, right, *bias, name="gemm", **{"strides": [2, 2], **attributes})


def form(name: str, build: Any, shape: tuple[int | str, ...] = IMAGE, **more: Any) -> Form:
    return Form(f"Conv, {name}", build, shape, **more)


def activation_forms(kind: np.dtype, zero: int) -> Iterator[Form]:
    """Forms of one activation type, with a QuantizeLinear behind and without."""

    def x(s: Sketch) -> ir.Value:
        return s.activation(s.x, kind, zero=zero)

    def out(s: Sketch, y: ir.Value) -> ir.Value:
        return s.activation(y, kind, 0.1, zero)

    def shared(s: Sketch) -> ir.Value:
        y = conv(s, x(s), s.weight(**CHANNELS))
        return s.op("Add", out(s, y), y)

    yield form(f"{kind}", lambda s: conv(s, x(s), s.weight(**CHANNELS)))
    yield form(f"{kind}, result quantized", lambda s: out(s, conv(s, x(s), s.weight(**CHANNELS))))
    yield form(f"{kind}, one scale, result quantized", lambda s: out(s, conv(s, x(s), s.weight(KERNEL, scale=()))))
    yield form(f"{kind}, int32 bias, result quantized", lambda s: out(s, conv(s, x(s), s.weight(**CHANNELS), s.bias(32))))
    yield form(
        f"{kind}, int32 bias of another scale, result quantized",
        lambda s: out(s, conv(s, x(s), s.weight(**CHANNELS), s.bias(32, exact=False))),
    )
    yield form(f"{kind}, int32 bias", lambda s: conv(s, x(s), s.weight(**CHANNELS), s.bias(32)))
    yield form(f"{kind}, float bias, result quantized", lambda s: out(s, conv(s, x(s), s.weight(**CHANNELS), s.noise(32))))
    yield form(
        f"{kind}, Relu, result quantized",
        lambda s: s.activation(s.op("Relu", conv(s, x(s), s.weight(**CHANNELS))), kind, 0.1, zero - 128),
    )
    yield form(
        f"{kind}, scales along the input, result quantized",
        lambda s: out(s, conv(s, x(s), s.weight(KERNEL, scale=(16,), axis=1))),
    )
    yield form(
        f"{kind}, weight without zero point, result quantized", lambda s: out(s, conv(s, x(s), s.weight(point=False, **CHANNELS)))
    )
    yield form(
        f"{kind}, weight of zero point 3, result quantized", lambda s: out(s, conv(s, x(s), s.weight(KERNEL, scale=(), zero=3)))
    )
    yield form(f"{kind}, uint8 weight, result quantized", lambda s: out(s, conv(s, x(s), s.weight(KERNEL, UINT8, (), 128))))
    yield form(f"{kind}, float weight, result quantized", lambda s: out(s, conv(s, x(s), s.noise(*KERNEL))))
    yield form(f"{kind}, int4 weight, result quantized", lambda s: out(s, conv(s, x(s), s.weight(KERNEL, INT4, ()))))
    yield form(f"{kind}, result quantized and read", shared)


def shaped(name: str, kernel: tuple[int, ...], **attributes: Any) -> Iterator[Form]:
    """A convolution of codes of another shape, whose result stays float, or is quantized."""

    def build(s: Sketch) -> ir.Value:
        return conv(s, s.activation(s.x), s.weight(kernel, scale=(kernel[0],), axis=0), **{"strides": [1, 1], **attributes})

    yield form(f"int8, {name}", build)
    yield form(f"int8, {name}, result quantized", lambda s: s.activation(build(s), scale=0.1))


def factored(s: Sketch, kind: np.dtype = INT8, **attributes: Any) -> ir.Value:
    """x * (c / s[t]) -> Q/DQ(c) -> Conv -> * (s[t] / c) -> + bias, the scales in a table."""

    def entry(table: list[float]) -> ir.Value:
        return s.op("Gather", s.float(table), s.t, axis=0)

    x = s.activation(s.op("Mul", s.x, entry([1.0, 0.5])), kind)
    product = conv(s, x, s.weight(KERNEL, kind, (32,), axis=0), **attributes)
    return s.op("Add", s.op("Mul", product, entry([1.0, 2.0])), s.noise(32, 1, 1))


def direct(s: Sketch, kind: np.dtype = INT8, zero: int = 0, *, scalar: bool = True) -> ir.Value:
    """A scale that comes from a table, a number or an array of one."""
    index = s.op("Squeeze", s.t) if scalar else s.t
    scale, point = s.op("Gather", s.float([0.05, 0.1]), index, axis=0), s.constant(zero if scalar else [zero], kind)
    codes = s.op("QuantizeLinear", s.x, scale, point)
    return conv(
        s, s.op("DequantizeLinear", codes, scale, point), s.weight(KERNEL, INT8 if kind == UINT8 else kind, (32,), axis=0)
    )


def integers(s: Sketch, left: np.dtype, right: np.dtype, kernel: tuple[int, ...] = KERNEL, **attributes: Any) -> ir.Value:
    """ConvInteger behind a QuantizeLinear, in the form of the pass integer_convolutions."""
    zero, point = (128 if kind == UINT8 else 0 for kind in (left, right))
    x, w = s.quantized(s.x, left, 0.05, zero), s.codes(kernel, right)
    y = s.op(
        "ConvInteger", x, w, s.constant(zero, left), s.constant(point, right), name="gemm", **{"strides": [2, 2], **attributes}
    )
    return s.op("Add", s.op("Mul", s.op("Cast", y, to=s.dtype.value), s.noise(kernel[0], 1, 1)), s.noise(kernel[0], 1, 1))


def transposed(name: str, *, out: float = 0.0, **attributes: Any) -> Form:
    def build(s: Sketch) -> ir.Value:
        y = s.op("ConvTranspose", s.activation(s.x), s.weight((16, 4, 2, 2), scale=()), name="gemm", **attributes)
        return s.activation(y, scale=out) if out else y

    return Form(f"ConvTranspose, {name}", build, IMAGE)


PAD = {"pads": [1, 1, 1, 1]}
CONVOLUTIONS = (
    *activation_forms(INT8, 0), *(replace(form, only="ort") for form in activation_forms(UINT8, 128)),
    form("int8, result as uint8", lambda s: s.activation(conv(s, s.activation(s.x), s.weight(**CHANNELS)), UINT8, 0.1, 128)),
    form("int8 without zero points, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, points="", output_dtype=3), s.weight(**CHANNELS)), scale=0.1)),
    form("uint8 without zero points, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, UINT8, points=""), s.weight(**CHANNELS)), UINT8, 0.1, points=""), trap=True),
    form("int8, result quantized, opset 13", lambda s: s.activation(conv(s, s.activation(s.x), s.weight(**CHANNELS)), scale=0.1), opset=13),
    form("uint8, a scale a channel of x, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, UINT8, np.linspace(0.04, 0.06, 16), 128, axis=1), s.weight(**CHANNELS)), UINT8, 0.1, 128)),
    form("uint16, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, UINT16, zero=128), s.weight(**CHANNELS)), UINT16, 0.1, 128)),
    form("int8, in groups, result quantized", lambda s: s.activation(conv(s, s.activation(s.x), s.weight((16, 1, 2, 2), scale=(16,), axis=0), group=16), scale=0.1)),
    form("int8, of one dimension, result quantized", lambda s: s.activation(conv(s, s.activation(s.x), s.weight((32, 16, 2), scale=(32,), axis=0), strides=[1]), scale=0.1), ("batch", 16, 8)),
    form("int8, of three dimensions, result quantized", lambda s: s.activation(conv(s, s.activation(s.x), s.weight((32, 16, 2, 2, 2), scale=(32,), axis=0), strides=[1, 1, 1]), scale=0.1), ("batch", 16, 4, 4, 4)),
    *shaped("1x1", (32, 16, 1, 1)), *shaped("3x3, padded", (32, 16, 3, 3), **PAD), *shaped("3x3, strided", (32, 16, 3, 3), strides=[2, 2], **PAD),
    *shaped("dilated", (32, 16, 3, 3), dilations=[2, 2], **PAD), *shaped("padded at one side", (32, 16, 3, 3), strides=[2, 2], pads=[0, 0, 1, 1]),
    *shaped("in two groups", (32, 8, 3, 3), group=2, **PAD), *shaped("a group a channel", (16, 1, 3, 3), group=16, **PAD),
    *shaped("a group a channel, strided", (16, 1, 3, 3), group=16, strides=[2, 2], **PAD),
    form("int8, factored table", factored), form("fp8, factored table", lambda s: factored(s, FP8)),
    form("int8, scale from a table", direct), form("uint8, scale from a table", lambda s: direct(s, UINT8, 128), only="ort"), form("fp8, scale from a table", lambda s: direct(s, FP8), only="trt-rtx"),
    form("int8, one scale in an array, from a table", lambda s: direct(s, scalar=False)), form("int8, scale from a table, result quantized", lambda s: s.activation(direct(s), scale=0.1)),
    *(form(f"ConvInteger of {left} and {right}", lambda s, left=left, right=right: integers(s, left, right)) for left in (INT8, UINT8) for right in (INT8, UINT8)),
    form("ConvInteger in two groups", lambda s: integers(s, INT8, UINT8, (32, 8, 3, 3), group=2, **PAD)),
    form("ConvInteger, a group a channel", lambda s: integers(s, INT8, UINT8, (16, 1, 3, 3), group=16, **PAD)),
    form("fp8", lambda s: conv(s, s.activation(s.x, FP8), s.weight(KERNEL, FP8, (32,), axis=0))),
    form("fp8, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, FP8), s.weight(KERNEL, FP8, (32,), axis=0)), FP8, 0.1)),
    form("int8 weight only", lambda s: conv(s, s.x, s.weight(**CHANNELS))),
    form("int8 weight only, result quantized", lambda s: s.activation(conv(s, s.x, s.weight(**CHANNELS)), scale=0.1)),
    form("int4 weight only", lambda s: conv(s, s.x, s.weight(KERNEL, INT4, (32,), axis=0))),
    form("int4 blocks along axis 1", lambda s: conv(s, s.x, s.weight(KERNEL, INT4, (32, 1, 2, 2), axis=1, block_size=16))),
    *(Form(f"ConvTranspose, {name}", lambda s, scale=scale, attributes=attributes: s.op("ConvTranspose", s.activation(s.x), s.weight((16, 32, 2, 2), scale=scale, **attributes), name="gemm"), IMAGE)
      for name, scale, attributes in (("one scale", (), {}), ("scales along the output", (32,), {"axis": 1}), ("scales along the input", (16,), {"axis": 0}))),
    Form("ConvTranspose, uint8, result quantized", lambda s: s.activation(s.op("ConvTranspose", s.activation(s.x, UINT8, zero=128), s.weight((16, 32, 2, 2), scale=()), name="gemm"), UINT8, 0.1, 128), IMAGE),
    transposed("in two groups", group=2), transposed("strided", strides=[2, 2]), transposed("strided, result quantized", out=0.1, strides=[2, 2]),
    Form("ConvTranspose, fp8", lambda s: s.op("ConvTranspose", s.activation(s.x, FP8), s.weight((16, 32, 2, 2), FP8, ()), name="gemm"), IMAGE),
)  # fmt: skip
