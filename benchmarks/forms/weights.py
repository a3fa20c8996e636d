"""Weights alone quantized, and weights in blocks."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir

from .sketch import B64, E5M2, F16, F32, FP4, FP8, INT2, INT4, INT8, INT16, UINT4, UINT8, Form, K, N, Sketch

FLAT = ("batch", K)
WIDE = ("batch", 16, 256)


def only(name: str, kind: np.dtype, scale: tuple[int, ...], shape: tuple[int, ...] = (K, N), **attributes: Any) -> Form:
    """A MatMul of x and a stored weight."""
    return Form(name, lambda s: s.matmul(s.x, s.weight(shape, kind, scale, **attributes)))


def blocks(kind: np.dtype, size: int) -> Form:
    """Blocks of `size` along 256 inputs."""
    return Form(
        f"{kind} blocks of {size} of 256",
        lambda s: s.matmul(s.x, s.weight((256, N), kind, (-(-256 // size), N), axis=0, block_size=size)),
        WIDE,
    )


def under(left: np.dtype, right: np.dtype, zero: int = 0, parts: int = 2) -> Form:
    """Blocks under quantized activations."""
    attributes: dict[str, Any] = {"axis": 0, "block_size": K // parts}
    return Form(
        f"{right} in {parts} blocks under {left} activations",
        lambda s: s.matmul(s.activation(s.x, left, zero=zero), s.weight(kind=right, scale=(parts, N), **attributes)),
    )


def twice(s: Sketch, kind: np.dtype, *, dequantizers: int, **attributes: Any) -> ir.Value:
    """A weight that two GEMMs read."""
    codes = s.codes((K, N), kind)
    scale = s.float(np.full((2, N) if attributes.get("block_size") else N, 0.01))
    values = [s.op("DequantizeLinear", codes, scale, **attributes) for _ in range(dequantizers)]
    return s.op("Add", s.matmul(s.x, values[0]), s.matmul(s.op("Neg", s.x), values[-1], "other"))


def turned(kind: np.dtype, scale: tuple[int, ...], **attributes: Any) -> Form:
    """A weight [out, in] and a Transpose behind the DequantizeLinear."""
    label = "blocks" if "block_size" in attributes else "a scale a channel"
    return Form(
        f"{kind} weight only, [out, in], {label}, Transpose",
        lambda s: s.matmul(s.x, s.op("Transpose", s.weight((N, K), kind, scale, **attributes), perm=[1, 0])),
    )


def cast(s: Sketch) -> ir.Value:
    """float16 scales under a float32 graph, or the reverse, and a Cast."""
    other = np.float16 if s.dtype == F32 else np.float32
    values = s.op("DequantizeLinear", s.codes((K, N), INT4), s.constant(np.full((2, N), 0.01), other), **B64)
    return s.matmul(s.x, s.op("Cast", values, to=s.dtype.value))


def reshaped(s: Sketch, scale: tuple[int, ...], **attributes: Any) -> ir.Value:
    """A weight of another rank, and a Reshape behind the DequantizeLinear."""
    return s.matmul(s.activation(s.x), s.op("Reshape", s.weight((1, K, N), scale=scale, **attributes), s.constant([K, N])))


def quantized(kind: np.dtype) -> Form:
    """A weight as floats, QuantizeLinear and DequantizeLinear."""
    return Form(
        f"{kind}, weight as float + Q + DQ",
        lambda s: s.matmul(s.activation(s.x, kind), s.activation(s.noise(K, N), kind, np.linspace(0.005, 0.02, N), axis=1)),
    )


WEIGHTS = (
    *(blocks(kind, size) for kind, size in product((INT4, INT8), (8, 16, 32, 64, 96, 128, 256))),
    *(blocks(kind, size) for kind, size in ((UINT4, 32), (UINT4, 96), (UINT8, 64), (FP8, 64), (INT16, 64))),
    Form("int2 blocks", lambda s: s.matmul(s.x, s.weight(kind=INT2, scale=(2, N), point=False, **B64)), opset=25),
    Form("float4 blocks of 16", lambda s: s.matmul(s.x, s.op("DequantizeLinear", s.constant(np.ones((K, N)), FP4), s.float(np.full((8, N), 0.01)), axis=0, block_size=16)), opset=23),
    Form("int4 blocks in the other float type", lambda s: s.matmul(s.x, s.weight(kind=INT4, scale=(2, N), **B64)), dtype=F32, only="trt-rtx"),
    Form("int4 blocks in fp16", lambda s: s.matmul(s.x, s.weight(kind=INT4, scale=(2, N), **B64)), dtype=F16, only="ort"),
    only("int4 blocks, no zero point", INT4, (2, N), point=False, **B64),
    only("int4 blocks, zero point 3", INT4, (2, N), zero=3, **B64),
    only("uint4 blocks, zero point 8", UINT4, (2, N), zero=8, **B64),
    only("uint8 blocks, zero point 128", UINT8, (2, N), zero=128, **B64),
    only("int4 blocks along the output", INT4, (K, 2), axis=1, block_size=64),
    only("int4 blocks along axis -2", INT4, (2, N), axis=-2, block_size=64),
    only("int4 blocks along two axes", INT4, (2, 2), **B64),
    only("int4 blocks of a weight of rank 3", INT4, (1, 2, N), (1, K, N), axis=1, block_size=64),
    Form("block_size 96 of 128 inputs", lambda s: s.matmul(s.x, s.weight(kind=INT4, scale=(2, N), axis=0, block_size=96)), trap=True),
    Form("int4 blocks, 200 inputs in blocks of 64", lambda s: s.matmul(s.x, s.weight((200, N), INT4, (4, N), **B64)), ("batch", 16, 200), trap=True),
    only("int4, a scale an output channel", INT4, (N,), axis=1),
    only("int4, one scale", INT4, ()),
    only("int8 weight only, a scale an output channel", INT8, (N,), axis=1),
    only("int8 weight only, axis not written", INT8, (N,)),
    only("int8 weight only, axis -1", INT8, (N,), axis=-1),
    only("int8 weight only, zero point 3", INT8, (N,), zero=3, axis=1),
    only("int8 weight only, one scale", INT8, ()),
    only("int8 weight only, one scale of rank 1", INT8, (1,)),
    only("int8 weight only, along the input", INT8, (K,), axis=0),
    only("uint8 weight only", UINT8, (N,), zero=128, axis=1),
    only("int16 weight only", INT16, (N,), axis=1),
    only("fp8 weight only", FP8, (N,), axis=1),
    only("float8 e5m2 weight only", E5M2, (), axis=1),
    turned(INT8, (N,), axis=0), turned(INT4, (N, 2), axis=1, block_size=64),
    Form("int4 blocks that two GEMMs read", lambda s: twice(s, INT4, dequantizers=1, **B64)),
    Form("int4 blocks, two DQs of the same codes", lambda s: twice(s, INT4, dequantizers=2, **B64)),
    Form("int8 weight that two GEMMs read", lambda s: twice(s, INT8, dequantizers=1, axis=1)),
    Form("int4 blocks, a QuantizeLinear behind", lambda s: s.activation(s.matmul(s.x, s.weight(kind=INT4, scale=(2, N), **B64)), scale=0.3)),
    Form("int4 blocks and an Add", lambda s: s.op("Add", s.matmul(s.x, s.weight(kind=INT4, scale=(2, N), **B64)), s.noise(N))),
    Form("int4 blocks and an Add, input of rank 2", lambda s: s.op("Add", s.matmul(s.x, s.weight(kind=INT4, scale=(2, N), **B64)), s.noise(N)), FLAT),
    Form("int4 blocks and an Add of rank 2, input of rank 2", lambda s: s.op("Add", s.matmul(s.x, s.weight(kind=INT4, scale=(2, N), **B64)), s.noise(1, N)), FLAT),
    Form("int4 blocks and an Add, fixed shapes", lambda s: s.op("Add", s.matmul(s.x, s.weight(kind=INT4, scale=(2, N), **B64)), s.noise(N)), (2, 16, K)),
    Form("int4 blocks on the left", lambda s: s.matmul(s.weight((16, K), INT4, (16, 2), axis=1, block_size=64), s.op("Transpose", s.x, perm=[0, 2, 1]))),
    Form("int4 blocks with a Cast behind", cast),
    under(INT8, INT8), under(UINT8, INT8, 128), under(INT8, INT4), under(UINT8, INT4, 128), under(FP8, INT4),
    under(UINT8, INT8, 128, parts=1), under(INT8, INT8, parts=1),
    Form("activation in blocks", lambda s: s.matmul(s.activation(s.x, scale=np.linspace(0.04, 0.06, 32).reshape(1, 16, 2), axis=2, block_size=64), s.weight(axis=1)), (1, 16, K), trap=True),
    Form("activation in blocks, uint8", lambda s: s.matmul(s.activation(s.x, UINT8, np.linspace(0.04, 0.06, 32).reshape(1, 16, 2), 128, axis=2, block_size=64), s.weight(axis=1)), (1, 16, K), only="ort"),
    quantized(INT8), quantized(FP8),
    Form("int8 weight [out, in] and Transpose", lambda s: s.matmul(s.activation(s.x), s.op("Transpose", s.weight((N, K), axis=0), perm=[1, 0]))),
    Form("int8 weight [out, in] and Transpose, scales along the input", lambda s: s.matmul(s.activation(s.x), s.op("Transpose", s.weight((N, K), scale=(K,), axis=1), perm=[1, 0]))),
    Form("int8 weight and Reshape, a scale a channel", lambda s: reshaped(s, (N,), axis=2)),
    Form("int8 weight and Reshape, one scale", lambda s: reshaped(s, ())),
    Form("int8 weight and Unsqueeze", lambda s: s.matmul(s.activation(s.x), s.op("Unsqueeze", s.weight(axis=1), s.constant([0])))),
    Form("codes turned before the DQ", lambda s: s.matmul(s.activation(s.x), s.op("DequantizeLinear", s.op("Transpose", s.codes((N, K), INT8), perm=[1, 0]), s.float(np.full(N, 0.01)), s.constant(np.zeros(N), INT8), axis=1))),
    Form("weight of rank 3, one scale", lambda s: s.matmul(s.activation(s.x), s.weight((2, K, N), scale=())), ("batch", 2, 16, K)),
    Form("weight of rank 3, a scale a channel", lambda s: s.matmul(s.activation(s.x), s.weight((2, K, N), axis=2)), ("batch", 2, 16, K)),
    Form("int8 weight on the left", lambda s: s.matmul(s.weight((16, 16), scale=()), s.activation(s.x))),
    Form("int8 weight on the left, uint8 activation", lambda s: s.matmul(s.weight((16, 16), scale=()), s.activation(s.x, UINT8, zero=128))),
    Form("uint8 weight on the left, uint8 activation", lambda s: s.matmul(s.weight((16, 16), UINT8, (), 128), s.activation(s.x, UINT8, zero=128))),
    Form("int8 weight on the left, a scale a column", lambda s: s.matmul(s.weight((16, 16), scale=(16,), axis=1), s.activation(s.x))),
    Form("int8 weight on the left, a scale a row", lambda s: s.matmul(s.weight((16, 16), scale=(16,), axis=0), s.activation(s.x))),
)  # fmt: skip
