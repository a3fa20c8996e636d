"""Gemm, and MatMul with an Add that becomes one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .sketch import B64, FP8, INT4, INT8, INT32, UINT8, UINT16, Form, K, N, Sketch

FLAT = ("batch", K)
FIXED = (16, K)


def gemm(s: Sketch, left: ir.Value, right: ir.Value, *bias: ir.Value, name: str = "gemm", **attributes: Any) -> ir.Value:
    return s.op("Gemm", left, right, *bias, name=name, **attributes)


def form(name: str, build: Any, **more: Any) -> Form:
    return Form(f"Gemm, {name}", build, more.pop("shape", FLAT), **more)


def typed(kind: np.dtype, zero: int, *, transposed: bool) -> Form:
    """A Gemm of stored weights [in, out] or [out, in]."""
    attributes: dict[str, Any] = {"axis": 0} if transposed else {"axis": 1}
    return form(
        f"{kind}{' transB' if transposed else ''}",
        lambda s: gemm(s, s.activation(s.x, kind, zero=zero), s.weight(**attributes), transB=int(transposed)),
    )


def two(s: Sketch, kind: np.dtype, zero: int) -> ir.Value:
    """Two Gemms that read one activation."""
    x = s.activation(s.x, kind, zero=zero)
    return s.op("Add", gemm(s, x, s.weight(axis=0), transB=1), gemm(s, x, s.weight(axis=0), name="other", transB=1))


def biased(s: Sketch, bias: ir.Value, kind: np.dtype = INT8, zero: int = 0, **attributes: Any) -> ir.Value:
    return gemm(s, s.activation(s.x, kind, zero=zero), s.weight(axis=0), bias, transB=1, **attributes)


def added(name: str, bias: Any, shape: tuple[int | str, ...], kind: np.dtype = INT8, zero: int = 0, **more: Any) -> Form:
    """MatMul and Add."""
    return Form(f"MatMul and Add: {name}, {kind}", lambda s: s.op("Add", s.plain(kind=kind, zero=zero), bias(s)), shape, **more)


def read_by_add_and_mul(s: Sketch) -> ir.Value:
    """A MatMul whose result an Add and a Mul read."""
    y = s.plain()
    return s.op("Mul", s.op("Add", y, s.noise(N)), y)


def short(s: Sketch) -> ir.Value:
    """An int32 bias without zero point."""
    codes = s.constant(s.random.integers(-999, 999, N), INT32)
    return biased(s, s.op("DequantizeLinear", codes, s.float(0.05 * 0.01 * np.linspace(0.5, 2, N)), axis=0))


GEMMS = (
    *(typed(kind, zero, transposed=turned) for kind, zero in ((INT8, 0), (UINT8, 128), (UINT16, 0)) for turned in (False, True)),
    form("uint8, int8 bias of zero point 0", lambda s: gemm(s, s.activation(s.x, UINT8), s.weight(axis=1)), trap=True),
    form("int32 bias", lambda s: biased(s, s.bias())),
    form("int32 bias of another scale", lambda s: biased(s, s.bias(exact=False))),
    form("int32 bias without zero point", short),
    form("float bias", lambda s: biased(s, s.noise(N))),
    form("float bias, uint8", lambda s: biased(s, s.noise(N), UINT8, 128)),
    form("weight without zero point", lambda s: gemm(s, s.activation(s.x), s.weight(axis=0, point=False), transB=1)),
    form("int8 without zero points", lambda s: gemm(s, s.activation(s.x, points="", output_dtype=3), s.weight(axis=0), transB=1)),
    form("alpha 2", lambda s: gemm(s, s.activation(s.x), s.weight(axis=1), alpha=2.0)),
    form("alpha 2, int32 bias", lambda s: biased(s, s.bias(), alpha=2.0)),
    form("beta 0.5, int32 bias", lambda s: biased(s, s.bias(), beta=0.5)),
    form("beta 0.5, no bias", lambda s: gemm(s, s.activation(s.x), s.weight(axis=0), transB=1, beta=0.5)),
    form("transA", lambda s: gemm(s, s.activation(s.x), s.weight((N, 16), scale=(16,), axis=1), transA=1), shape=(N, 16)),
    form("scales along the input", lambda s: gemm(s, s.activation(s.x), s.weight(axis=0))),
    form("transB, scales along the input", lambda s: gemm(s, s.activation(s.x), s.weight(axis=1), transB=1)),
    form("activation scale a channel", lambda s: gemm(s, s.activation(s.x, scale=np.linspace(0.04, 0.06, K), axis=1), s.weight(axis=0), transB=1)),
    form("activation scale a channel, uint8", lambda s: gemm(s, s.activation(s.x, UINT8, np.linspace(0.04, 0.06, K), 128, axis=1), s.weight(axis=0), transB=1)),
    form("int4 weight under int8", lambda s: gemm(s, s.activation(s.x), s.weight(kind=INT4, axis=0), transB=1)),
    form("fp8", lambda s: gemm(s, s.activation(s.x, FP8), s.weight(kind=FP8, axis=0), transB=1)),
    form("two of one activation", lambda s: two(s, INT8, 0)),
    form("two of one activation, uint8", lambda s: two(s, UINT8, 128)),
    form("activation only", lambda s: gemm(s, s.activation(s.x), s.noise(N, K), transB=1)),
    form("int8 weight only", lambda s: gemm(s, s.x, s.weight(axis=1))),
    form("int8 weight only, transB", lambda s: gemm(s, s.x, s.weight(axis=0), transB=1)),
    form("int4 blocks", lambda s: gemm(s, s.x, s.weight(kind=INT4, scale=(2, N), **B64))),
    form("int4 blocks, float bias", lambda s: gemm(s, s.x, s.weight(kind=INT4, scale=(2, N), **B64), s.noise(N))),
    form("int4 blocks, float bias of rank 2", lambda s: gemm(s, s.x, s.weight(kind=INT4, scale=(2, N), **B64), s.noise(1, N))),
    form("int4 blocks, alpha 2", lambda s: gemm(s, s.x, s.weight(kind=INT4, scale=(2, N), **B64), alpha=2.0)),
    form("int4 blocks, transB", lambda s: gemm(s, s.x, s.weight((N, K), INT4, (N, 2), axis=1, block_size=64), transB=1)),
    added("a constant, rank 2", lambda s: s.noise(N), FLAT), added("a constant, rank 2", lambda s: s.noise(N), FLAT, UINT8, 128),
    added("a constant, rank 3", lambda s: s.noise(N), ("batch", 16, K), UINT8, 128),
    added("a constant, fixed rank 3", lambda s: s.noise(N), (2, 16, K)),
    added("a constant, fixed rank 3", lambda s: s.noise(N), (2, 16, K), UINT8, 128),
    added("a constant, fixed rank 3, opset 19", lambda s: s.noise(N), (2, 16, K), opset=19),
    added("a constant [1, N]", lambda s: s.noise(1, N), FLAT), added("a constant [M, N]", lambda s: s.noise(16, N), FIXED),
    added("a constant [M, 1]", lambda s: s.noise(16, 1), FIXED), added("a constant [1]", lambda s: s.noise(1), FIXED),
    added("a scalar", lambda s: s.float(1.0), FLAT), added("x itself", lambda s: s.x, FLAT),
    added("an int32 bias, rank 2", lambda s: s.bias(), FLAT), added("an int32 bias, rank 3", lambda s: s.bias(), ("batch", 16, K)),
    added("an int32 bias, rank 3", lambda s: s.bias(), ("batch", 16, K), UINT8, 128),
    added("an int32 bias of another scale, rank 2", lambda s: s.bias(exact=False), FLAT),
    Form("MatMul and Add, with a Mul between", lambda s: s.op("Add", s.op("Mul", s.plain(), s.noise(N)), s.noise(N)), FLAT),
    Form("MatMul that an Add and a Mul read", read_by_add_and_mul, FIXED),
)  # fmt: skip
