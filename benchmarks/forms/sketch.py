"""Builds small graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

K, N, TOKENS = 128, 128, 16
F16, F32, BF16 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16
INT8, UINT8, INT16, UINT16, INT32 = (np.dtype(kind) for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32))
INT4, UINT4, INT2 = (np.dtype(kind) for kind in (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2))
FP8, E5M2, FP4 = (np.dtype(kind) for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn))
MICROSOFT = "com.microsoft"
B64: dict[str, Any] = {"axis": 0, "block_size": 64}


class Sketch:
    """Builds a graph with one float input `x` and, if it is read, an int64 input `t` of shape [1]."""

    def __init__(self, dtype: ir.DataType, shape: Iterable[int | str], opset: int) -> None:
        self.dtype, self.opset = dtype, opset
        self.x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.t = ir.Value(name="t", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.functions: list[ir.Function] = []
        self.random = np.random.default_rng(0)

    def constant(self, value: Any, kind: Any = None) -> ir.Value:
        """An initializer."""
        content = np.asarray(value, dtype=kind)
        tensor = ir.tensor(np.ascontiguousarray(content).reshape(content.shape))
        stored = ir.Value(
            name=f"c{len(self.constants)}", const_value=tensor, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype)
        )
        self.constants.append(stored)
        return stored

    def float(self, value: Any) -> ir.Value:
        """An initializer of the graph's float type."""
        return self.constant(value, self.dtype.numpy())

    def noise(self, *shape: int) -> ir.Value:
        """A float initializer of normal numbers with a deviation of 0.3."""
        return self.float(self.random.normal(0, 0.3, shape))

    def op(self, kind: str, *inputs: ir.Value | None, name: str = "", domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one result."""
        return self.several(kind, *inputs, outputs=1, name=name, domain=domain, **attributes)[0]

    def several(
        self, kind: str, *inputs: ir.Value | None, outputs: int, name: str = "", domain: str = "", **attributes: Any
    ) -> Any:
        """A node with several results."""
        label = name or f"{kind}{len(self.nodes)}"
        node = ir.node(kind, list(inputs), attributes=attributes or None, name=label, domain=domain, num_outputs=outputs)
        for index, output in enumerate(node.outputs):
            output.name = f"{label}_{index}"
        self.nodes.append(node)
        return node.outputs

    def quantized(
        self, x: ir.Value, kind: np.dtype = INT8, scale: Any = 0.05, zero: int = 0, *, point: bool = True, **attributes: Any
    ) -> ir.Value:
        """QuantizeLinear alone."""
        zeros = (self.constant(np.full(np.shape(scale), zero), kind),) if point else ()
        return self.op("QuantizeLinear", x, self.float(scale), *zeros, **attributes)

    def activation(
        self,
        x: ir.Value,
        kind: np.dtype = INT8,
        scale: Any = 0.05,
        zero: int = 0,
        *,
        points: str = "qd",
        between: Callable[[ir.Value], ir.Value] = lambda codes: codes,
        **attributes: Any,
    ) -> ir.Value:
        """QuantizeLinear and DequantizeLinear.

        Args:
            points: `q` and `d` for a zero point of the one and the other.
            between: what stands between the two.
            attributes: of both, except `output_dtype`, which the QuantizeLinear alone gets.
        """
        step = scale if isinstance(scale, ir.Value) else self.float(scale)
        shape = () if step.const_value is None else step.const_value.shape.numpy()
        point = self.constant(np.full(shape, zero), kind)
        codes = self.op("QuantizeLinear", x, step, *((point,) if "q" in points else ()), **attributes)
        attributes.pop("output_dtype", None)
        return self.op("DequantizeLinear", between(codes), step, *((point,) if "d" in points else ()), **attributes)

    def weight(
        self,
        shape: tuple[int, ...] = (K, N),
        kind: np.dtype = INT8,
        scale: tuple[int, ...] = (N,),
        zero: int = 0,
        *,
        point: bool = True,
        step: float = 0.01,
        **attributes: Any,
    ) -> ir.Value:
        """Stored codes and DequantizeLinear; the scales rise from half of `step` to twice."""
        steps = step * np.linspace(0.5, 2, int(np.prod(scale))).reshape(scale) if scale else np.asarray(step)
        zeros = (self.constant(np.full(scale, zero).astype(kind)),) if point else ()
        return self.op("DequantizeLinear", self.codes(shape, kind), self.float(steps), *zeros, **attributes)

    def codes(self, shape: tuple[int, ...], kind: np.dtype) -> ir.Value:
        """Stored codes over most of a type's range."""
        low, high = {INT4: (-7, 8), UINT4: (0, 16), INT2: (-1, 2), UINT8: (0, 255)}.get(kind, (-100, 100))
        return self.constant(self.random.integers(low, high, shape).astype(kind))

    def bias(self, size: int = N, *, exact: bool = True, axis: int = 0) -> ir.Value:
        """An int32 bias behind a DequantizeLinear, by the product of the scales of `activation` and `weight`, or by another."""
        steps = 0.05 * 0.01 * np.linspace(0.5, 2, size) if exact else np.full(size, 0.02)
        codes = self.constant(self.random.integers(-999, 999, size), INT32)
        return self.op("DequantizeLinear", codes, self.float(steps), self.constant(np.zeros(size), INT32), axis=axis)

    def matmul(self, left: ir.Value, right: ir.Value, name: str = "gemm") -> ir.Value:
        """A MatMul, the judged one unless it has another name."""
        return self.op("MatMul", left, right, name=name)

    def plain(self, **activation: Any) -> ir.Value:
        """A MatMul of x, quantized, and of an int8 weight with a scale an output channel."""
        return self.matmul(self.activation(self.x, **activation), self.weight(axis=1))

    def body(self, name: str, inputs: Iterable[ir.Value], build: Callable[[Sketch], Iterable[ir.Value]]) -> ir.Graph:
        """The body of an If, Loop or Scan."""
        inner = Sketch(self.dtype, (), self.opset)
        results = list(build(inner))
        for value in (*inner.constants, *(output for node in inner.nodes for output in node.outputs)):
            value.name = f"{name}_{value.name}"
        return ir.Graph(list(inputs), results, nodes=inner.nodes, initializers=inner.constants, name=name)

    def function(self, name: str, inputs: int, build: Callable[..., ir.Value]) -> Callable[..., ir.Value]:
        """A function of the model; gives what calls it."""
        inner = Sketch(self.dtype, (), self.opset)
        values = [ir.Value(name=f"{name}_{index}") for index in range(inputs)]
        result = build(inner, *values)
        graph = ir.Graph(values, [result], nodes=inner.nodes, opset_imports={"": self.opset, "local": 1}, name=name)
        self.functions += [*inner.functions, ir.Function("local", name, graph=graph, attributes=[])]
        return lambda *arguments, label="": self.op(name, *arguments, name=label, domain="local")

    def model(self, y: ir.Value) -> ir.Model:
        """The finished graph."""
        y.name, y.type = "y", ir.TensorType(self.dtype)
        inputs = [self.x, self.t] if self.t.uses() else [self.x]
        domains = {node.domain: 1 for node in self.nodes if node.domain}
        graph = ir.Graph(
            inputs, [y], nodes=self.nodes, initializers=self.constants, opset_imports={"": self.opset, **domains}, name="form"
        )
        return ir.Model(graph, ir_version=10, functions=self.functions)


@dataclass(frozen=True)
class Form:
    """One way to write a quantized operator, which is called `gemm`.

    Args:
        build: adds it to a sketch and gives the graph's result.
        shape: of the input.
        dtype: of the graph; else float32 for ONNX Runtime, float16 for TensorRT-RTX.
        trap: TensorRT-RTX takes it and computes other numbers than ONNX says; the checker must refuse.
        only: `ort` or `trt-rtx`, for a form that means nothing to the other.
    """

    name: str
    build: Callable[[Sketch], ir.Value]
    shape: tuple[int | str, ...] = ("batch", TOKENS, K)
    opset: int = 21
    dtype: ir.DataType | None = None
    trap: bool = False
    only: str = ""

    def model(self, target: str) -> ir.Model:
        """The graph for a target."""
        sketch = Sketch(self.dtype or (F32 if target == "ort" else F16), self.shape, self.opset)
        return sketch.model(self.build(sketch))
