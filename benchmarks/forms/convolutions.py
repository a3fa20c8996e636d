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


def conv(s: Sketch, left: ir.Value, right: ir.Value, *bias: ir.Value, **how: Any) -> ir.Value:
    return s.op("Conv", left, right, *bias, name="gemm", **{"strides": [2, 2], **how})


def form(name: str, build: Any, shape: tuple[int | str, ...] = IMAGE, **more: Any) -> Form:
    return Form(f"Conv, {name}", build, shape, **more)


def both(kind: np.dtype, zero: int) -> Iterator[Form]:
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


CONVOLUTIONS = (
    *both(INT8, 0), *(replace(form, only="ort") for form in both(UINT8, 128)),
    form("int8, result as uint8", lambda s: s.activation(conv(s, s.activation(s.x), s.weight(**CHANNELS)), UINT8, 0.1, 128)),
    form("int8 without zero points, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, points="", quantize={"output_dtype": 3}), s.weight(**CHANNELS)), scale=0.1)),
    form("uint8 without zero points, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, UINT8, points=""), s.weight(**CHANNELS)), UINT8, 0.1, points=""), trap=True),
    form("int8, result quantized, opset 13", lambda s: s.activation(conv(s, s.activation(s.x), s.weight(**CHANNELS)), scale=0.1), opset=13),
    form("uint8, a scale a channel of x, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, UINT8, np.linspace(0.04, 0.06, 16), 128, axis=1), s.weight(**CHANNELS)), UINT8, 0.1, 128)),
    form("uint16, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, UINT16, zero=128), s.weight(**CHANNELS)), UINT16, 0.1, 128)),
    form("int8, in groups, result quantized", lambda s: s.activation(conv(s, s.activation(s.x), s.weight((16, 1, 2, 2), scale=(16,), axis=0), group=16), scale=0.1)),
    form("int8, of one dimension, result quantized", lambda s: s.activation(conv(s, s.activation(s.x), s.weight((32, 16, 2), scale=(32,), axis=0), strides=[1]), scale=0.1), ("batch", 16, 8)),
    form("int8, of three dimensions, result quantized", lambda s: s.activation(conv(s, s.activation(s.x), s.weight((32, 16, 2, 2, 2), scale=(32,), axis=0), strides=[1, 1, 1]), scale=0.1), ("batch", 16, 4, 4, 4)),
    form("fp8", lambda s: conv(s, s.activation(s.x, FP8), s.weight(KERNEL, FP8, (32,), axis=0))),
    form("fp8, result quantized", lambda s: s.activation(conv(s, s.activation(s.x, FP8), s.weight(KERNEL, FP8, (32,), axis=0)), FP8, 0.1)),
    form("int8 weight only", lambda s: conv(s, s.x, s.weight(**CHANNELS))),
    form("int8 weight only, result quantized", lambda s: s.activation(conv(s, s.x, s.weight(**CHANNELS)), scale=0.1)),
    form("int4 weight only", lambda s: conv(s, s.x, s.weight(KERNEL, INT4, (32,), axis=0))),
    form("int4 blocks along axis 1", lambda s: conv(s, s.x, s.weight(KERNEL, INT4, (32, 1, 2, 2), axis=1, block_size=16))),
    *(Form(f"ConvTranspose, {name}", lambda s, scale=scale, how=how: s.op("ConvTranspose", s.activation(s.x), s.weight((16, 32, 2, 2), scale=scale, **how), name="gemm"), IMAGE)
      for name, scale, how in (("one scale", (), {}), ("scales along the output", (32,), {"axis": 1}), ("scales along the input", (16,), {"axis": 0}))),
    Form("ConvTranspose, uint8, result quantized", lambda s: s.activation(s.op("ConvTranspose", s.activation(s.x, UINT8, zero=128), s.weight((16, 32, 2, 2), scale=()), name="gemm"), UINT8, 0.1, 128), IMAGE),
    Form("ConvTranspose, fp8", lambda s: s.op("ConvTranspose", s.activation(s.x, FP8), s.weight((16, 32, 2, 2), FP8, ()), name="gemm"), IMAGE),
)  # fmt: skip
