"""The static checker against the real TensorRT-RTX builder: one small graph a form, both verdicts, and where they differ.

    pip install -c constraints.txt ".[cpu,rtx]" && python benchmarks/checker.py

No GPU is needed: the builder's verdict is read off the list of layers that it prints.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dq_export.deploy.backend import BackendError
from dq_export.deploy.check import check
from dq_export.deploy.layers import kernel_of, read_layers
from dq_export.deploy.plan import PlanRequest, build_plan

K, N, TOKENS = 128, 128, 16
F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
INT8, FP8, INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.int4)
TRAP = "trap"
"""The builder takes it and computes other numbers than ONNX says; the checker must refuse."""


class Sketch:
    """A graph in the making: x[B, TOKENS, K] -> y."""

    def __init__(self, dtype: ir.DataType = F16) -> None:
        self.dtype = dtype
        self.x = ir.Value(name="x", shape=ir.Shape(["batch", TOKENS, K]), type=ir.TensorType(dtype))
        self.t = ir.Value(name="t", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def constant(self, value: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(value).reshape(value.shape))
        name = f"c{len(self.constants)}"
        made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype))
        self.constants.append(made)
        return made

    def float(self, value: np.ndarray | float) -> ir.Value:
        return self.constant(np.asarray(value, dtype=self.dtype.numpy()))

    def op(self, kind: str, *inputs: ir.Value | None, name: str = "", **attributes: object) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes=attributes or None, name=name or f"{kind}{len(self.nodes)}")  # type: ignore[arg-type]
        source = next(value for value in inputs if value is not None)
        wide = kind in ("QuantizeLinear",)
        node.outputs[0].dtype = inputs[2].dtype if wide and inputs[2] is not None else self.dtype
        node.outputs[0].shape = None if kind in ("MatMul", "Transpose", "Gemm") else source.shape
        node.outputs[0].name = f"{node.name}_out"
        self.nodes.append(node)
        return node.outputs[0]

    def activation(
        self, x: ir.Value, scale: np.ndarray | float | ir.Value, kind: np.dtype = INT8, **attributes: object
    ) -> ir.Value:
        made = scale if isinstance(scale, ir.Value) else self.float(scale)
        shape = () if made.const_value is None else tuple(made.const_value.shape)
        zero = self.constant(np.zeros([int(d) for d in shape], dtype=kind))
        codes = self.op("QuantizeLinear", x, made, zero, **attributes)
        return self.op("DequantizeLinear", codes, made, zero, **attributes)

    def weight(
        self,
        shape: tuple[int, ...] = (K, N),
        kind: np.dtype = INT8,
        scale: tuple[int, ...] = (N,),
        *,
        stored: bool = True,
        **how: object,
    ) -> ir.Value:
        random = np.random.default_rng(0)
        codes = (random.integers(-7, 8, shape) if kind == INT4 else random.normal(0, 40, shape)).astype(kind)
        steps = self.float(np.full(scale, 0.01))
        zero = self.constant(np.zeros(scale, dtype=kind))
        if stored:
            return self.op("DequantizeLinear", self.constant(codes), steps, zero, **how)
        values = self.float(codes.astype(np.float32) * 0.01)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", values, steps, zero, **how), steps, zero, **how)

    def model(self, y: ir.Value, opset: int = 21) -> ir.Model:
        y.name = "y"
        inputs = [self.x, self.t] if self.t.uses() else [self.x]
        graph = ir.Graph(inputs, [y], nodes=self.nodes, initializers=self.constants, opset_imports={"": opset}, name="form")
        return ir.Model(graph, ir_version=10)


Make = Callable[[], ir.Model]


@dataclass(frozen=True)
class Form:
    """One way to write a quantized GEMM, which is called `gemm`."""

    name: str
    make: Make
    trap: bool = False


def simple(kind: np.dtype = INT8, dtype: ir.DataType = F16, scale: tuple[int, ...] = (N,), **how: object) -> Make:
    def make() -> ir.Model:
        s = Sketch(dtype)
        extra = {"axis": 1, **how} if scale else how
        y = s.op("MatMul", s.activation(s.x, 0.05, kind), s.weight(kind=kind, scale=scale, **extra), name="gemm")  # type: ignore[arg-type]
        return s.model(s.op("Add", y, s.float(np.ones(N))))

    return make


def weight_only(kind: np.dtype, scale: tuple[int, ...], dtype: ir.DataType = F16, **how: object) -> Make:
    def make() -> ir.Model:
        s = Sketch(dtype)
        return s.model(s.op("MatMul", s.x, s.weight(kind=kind, scale=scale, **how), name="gemm"))  # type: ignore[arg-type]

    return make


def turned(gemm: bool) -> Make:
    def make() -> ir.Model:
        s = Sketch()
        weight = s.weight((N, K), axis=0)
        if not gemm:
            return s.model(s.op("MatMul", s.activation(s.x, 0.05), s.op("Transpose", weight, perm=[1, 0]), name="gemm"))
        flat = s.op("Reshape", s.activation(s.x, 0.05), s.constant(np.asarray([-1, K])))
        return s.model(s.op("Gemm", flat, weight, transB=1, name="gemm"))

    return make


def sided(*, activation: bool, weight: bool) -> Make:
    def make() -> ir.Model:
        s = Sketch()
        left = s.activation(s.x, 0.05) if activation else s.x
        right = s.weight(axis=1) if weight else s.float(np.full((K, N), 0.1))
        return s.model(s.op("MatMul", left, right, name="gemm"))

    return make


def activated(scale: np.ndarray | float, kind: np.dtype = INT8, weight: np.dtype = INT8, **how: object) -> Make:
    def make() -> ir.Model:
        s = Sketch()
        return s.model(s.op("MatMul", s.activation(s.x, scale, kind, **how), s.weight(kind=weight, axis=1), name="gemm"))

    return make


def gathered(*, factored: bool, kind: np.dtype = INT8, split: bool = False) -> Make:
    def make() -> ir.Model:
        s = Sketch()
        table = np.asarray([0.02, 0.05])
        width = 3 * N if split else N
        weight = s.weight((K, width), kind, (width,), axis=1)
        index = s.op("Squeeze", s.t)
        index.dtype, index.shape = ir.DataType.INT64, ir.Shape([])
        if not factored:
            scale = s.op("Gather", s.float(table), index, axis=0)
            scale.shape = ir.Shape([])
            zero = s.constant(np.asarray(0, dtype=kind))
            codes = s.op("QuantizeLinear", s.x, scale, zero)
            return s.model(s.op("MatMul", s.op("DequantizeLinear", codes, scale, zero), weight, name="gemm"))
        before, after = (s.op("Gather", s.float(values), index, axis=0) for values in (0.05 / table, table / 0.05))
        y = s.op("MatMul", s.activation(s.op("Mul", s.x, before), 0.05, kind), weight, name="gemm")
        y = s.op("Mul", y, after)
        return s.model(thirds(s, y) if split else y)

    return make


def thirds(s: Sketch, y: ir.Value, heads: int = 2) -> ir.Value:
    """Split and attend; with 0 heads, nothing is reshaped."""
    node = ir.node("Split", [y], attributes={"axis": 2, "num_outputs": 3}, num_outputs=3, name="split")
    for index, output in enumerate(node.outputs):
        output.name, output.dtype = f"part{index}", s.dtype
    s.nodes.append(node)
    if not heads:
        return attend(s, *node.outputs, turn=[0, 2, 1])
    parts = [s.op("Reshape", part, s.constant(np.asarray([0, 0, heads, N // heads]))) for part in node.outputs]
    return attend(s, *(s.op("Transpose", part, perm=[0, 2, 1, 3]) for part in parts), turn=[0, 1, 3, 2])


def attend(s: Sketch, q: ir.Value, k: ir.Value, v: ir.Value, turn: list[int]) -> ir.Value:
    scores = s.op("Softmax", s.op("MatMul", q, s.op("Transpose", k, perm=turn)), axis=-1)
    result = s.op("MatMul", scores, v)
    if len(turn) == 3:
        return result
    return s.op("Reshape", s.op("Transpose", result, perm=[0, 2, 1, 3]), s.constant(np.asarray([0, 0, N])))


def fused(kind: np.dtype = INT8, scale: tuple[int, ...] = (3 * N,), *, stored: bool = True, heads: int = 2) -> Make:
    def make() -> ir.Model:
        s = Sketch()
        extra = {"axis": 1} if scale else {}
        weight = s.weight((K, 3 * N), kind, scale, stored=stored, **extra)
        y = s.op("MatMul", s.activation(s.x, 0.05, kind), weight, name="gemm")
        return s.model(thirds(s, s.op("Add", y, s.float(np.ones(3 * N))), heads))

    return make


def gathered_heads() -> ir.Model:
    """q, k and v as timm takes them apart: Reshape, Transpose, three Gathers."""
    s = Sketch()
    y = s.op("MatMul", s.activation(s.x, 0.05), s.weight((K, 3 * N), scale=(3 * N,), axis=1), name="gemm")
    split = s.op("Reshape", y, s.constant(np.asarray([0, 0, 3, 2, N // 2])))
    turned = s.op("Transpose", split, perm=[2, 0, 3, 1, 4])
    q, k, v = (s.op("Gather", turned, s.constant(np.asarray(index)), axis=0) for index in range(3))
    return s.model(attend(s, q, k, v, turn=[0, 1, 3, 2]))


def dynamic(kind: np.dtype = INT8) -> Make:
    def make() -> ir.Model:
        s = Sketch()
        largest = s.op("ReduceMax", s.op("Abs", s.x), s.constant(np.asarray([-1])), keepdims=1)
        x = s.activation(s.op("Div", s.x, largest), 1 / 127 if kind == INT8 else 1 / 448, kind)
        return s.model(s.op("Mul", s.op("MatMul", x, s.weight(kind=kind, axis=1), name="gemm"), largest))

    return make


def mixed(left: np.dtype, right: np.dtype, scale: tuple[int, ...], **how: object) -> ir.Model:
    s = Sketch()
    return s.model(s.op("MatMul", s.activation(s.x, 0.05, left), s.weight(kind=right, scale=scale, **how), name="gemm"))  # type: ignore[arg-type]


def quantized_weight(kind: np.dtype) -> ir.Model:
    s = Sketch()
    return s.model(s.op("MatMul", s.activation(s.x, 0.05, kind), s.weight(kind=kind, stored=False, axis=1), name="gemm"))


def smoothed() -> ir.Model:
    s = Sketch()
    x = s.activation(s.op("Mul", s.x, s.float(np.linspace(0.5, 2, K))), 0.05)
    return s.model(s.op("MatMul", x, s.weight(axis=1), name="gemm"))


def folded_scale() -> ir.Model:
    s = Sketch()
    scale = s.op("Div", s.float(1.0), s.float(20.0))
    zero = s.constant(np.asarray(0, dtype=INT8))
    codes = s.op("QuantizeLinear", s.x, scale, zero)
    return s.model(s.op("MatMul", s.op("DequantizeLinear", codes, scale, zero), s.weight(axis=1), name="gemm"))


def spoiled(change: Callable[[Sketch], None]) -> Make:
    """The plain INT8 form with one constant changed."""

    def make() -> ir.Model:
        s = Sketch()
        y = s.op("MatMul", s.activation(s.x, 0.05), s.weight(axis=1), name="gemm")
        change(s)
        return s.model(y)

    return make


def put(s: Sketch, index: int, value: np.ndarray) -> None:
    """Give constant `index` another content: 0 and 1 are the activation's scale and zero point, 2 to 4 the weight's scale,
    zero point and codes."""
    old, new = s.constants[index], s.constant(value)
    s.constants.remove(new)
    for user, position in list(old.uses()):
        user.replace_input_with(position, new)
        if position == 2 and user.op_type == "QuantizeLinear":
            user.outputs[0].dtype = new.dtype
    s.constants[index] = new
    new.name = old.name


def foreign(kind: str) -> ir.Model:
    s = Sketch(F32)
    codes = s.constant(np.ones((TOKENS, K), dtype=np.int8))
    right = s.constant(np.ones((K, N), dtype=np.int8))
    if kind == "DynamicQuantizeLinear":
        node = ir.node(kind, [s.x], num_outputs=3, name="gemm")
        for index, (output, dtype) in enumerate(zip(node.outputs, (ir.DataType.UINT8, F32, ir.DataType.UINT8), strict=True)):
            output.name, output.dtype = f"d{index}", dtype
        s.nodes.append(node)
        y = s.op("DequantizeLinear", node.outputs[0], node.outputs[1], node.outputs[2])
        return s.model(y)
    one, zero = s.float(0.05), s.constant(np.asarray(0, dtype=np.int8))
    if kind == "MatMulInteger":
        product = s.op(kind, codes, right, name="gemm")
        product.dtype = ir.DataType.INT32
        y = s.op("Cast", product, to=F32.value)
    else:
        product = s.op(kind, codes, one, zero, right, one, zero, one, zero, name="gemm")
        product.dtype = ir.DataType.INT8
        y = s.op("DequantizeLinear", product, one, zero)
    return s.model(s.op("Add", s.x, s.op("ReduceSum", y)))


def convolved(kind: np.dtype) -> ir.Model:
    s = Sketch()
    image = s.op("Reshape", s.x, s.constant(np.asarray([-1, 16, 16, 8])))
    image.shape = ir.Shape(["batch", 16, 16, 8])
    weight = s.weight((32, 16, 2, 2), kind, (32,), axis=0)
    return s.model(s.op("Conv", s.activation(image, 0.05, kind), weight, strides=[2, 2], name="gemm"))


B4 = {"axis": 0, "block_size": 64}
FORMS = (
    Form("int8, a scale an output channel", simple()),
    Form("the same in fp32", simple(dtype=F32)),
    Form("the same in bf16", simple(dtype=ir.DataType.BFLOAT16)),
    Form("int8, one scale", simple(scale=())),
    Form("int8, weight as float + Q + DQ", lambda: quantized_weight(INT8)),
    Form("int8, weight [out, in] and Transpose", turned(gemm=False)),
    Form("int8, Gemm transB", turned(gemm=True)),
    Form("fp8, one scale", simple(FP8, scale=())),
    Form("fp8, a scale an output channel", simple(FP8)),
    Form("fp8, the same in fp32", simple(FP8, F32)),
    Form("fp8, weight as float + Q + DQ", lambda: quantized_weight(FP8)),
    Form("int4 blocks of 64, weight only", weight_only(INT4, (2, N), **B4)),
    Form("int4 blocks of 64, fp32", weight_only(INT4, (2, N), F32, **B4)),
    Form("int4 blocks of 128", weight_only(INT4, (1, N), axis=0, block_size=128)),
    Form("int4 blocks of 32", weight_only(INT4, (4, N), axis=0, block_size=32)),
    Form("int4 blocks along the output", weight_only(INT4, (K, 2), axis=1, block_size=64)),
    Form("int4, a scale an output channel", weight_only(INT4, (N,), axis=1)),
    Form("int4, one scale", weight_only(INT4, ())),
    Form("int8 weight only", sided(activation=False, weight=True)),
    Form("fp8 weight only", weight_only(FP8, (N,), axis=1)),
    Form("int8 activation only", sided(activation=True, weight=False)),
    Form("int8 blocks, weight only", weight_only(INT8, (2, N), **B4)),
    Form("int8 blocks under int8 activations", simple(INT8, scale=(2, N), **B4)),
    Form("int4 blocks under int8 activations", lambda: mixed(INT8, INT4, (2, N), **B4)),
    Form("int4 blocks under fp8 activations", lambda: mixed(FP8, INT4, (2, N), **B4)),
    Form("int8 activation, fp8 weight", lambda: mixed(INT8, FP8, (N,), axis=1)),
    Form("fp8 activation, int8 weight", lambda: mixed(FP8, INT8, (N,), axis=1)),
    Form("activation scale a channel", activated(np.full(K, 0.05), axis=2)),
    Form("activation scale a token", activated(np.full(TOKENS, 0.05), axis=1)),
    Form("activation scale a channel, fp8", activated(np.full(K, 0.05), FP8, FP8, axis=2)),
    Form("scale from a table, direct", gathered(factored=False)),
    Form("scale from a table, direct, fp8", gathered(factored=False, kind=FP8)),
    Form("scale from a table, factored", gathered(factored=True)),
    Form("scale from a table, factored, fp8", gathered(factored=True, kind=FP8)),
    Form("scale from a table, factored, one GEMM for q, k and v", gathered(factored=True, split=True)),
    Form("scale from arithmetic on constants", folded_scale),
    Form("dynamic, a scale a token, factored", dynamic()),
    Form("dynamic, the same in fp8", dynamic(FP8)),
    Form("Mul by a channel's constant before Q", smoothed),
    Form("one GEMM for q, k and v, a scale a channel", fused()),
    Form("one GEMM for q, k and v, one scale", fused(scale=())),
    Form("one GEMM for q, k and v, float + Q + DQ", fused(stored=False)),
    Form("one GEMM for q, k and v, fp8", fused(FP8)),
    Form("one GEMM for q, k and v, fp8, one scale", fused(FP8, scale=())),
    Form("one GEMM for q, k and v, taken apart by Gathers", gathered_heads),
    Form("one GEMM for three, nothing reshaped", fused(heads=0)),
    Form("weight scale along the input", lambda: mixed(INT8, INT8, (K,), axis=0)),
    Form("convolution, int8", lambda: convolved(INT8)),
    Form("convolution, fp8", lambda: convolved(FP8)),
    Form("zero point 3 of the activation", spoiled(lambda s: put(s, 1, np.asarray(3, dtype=np.int8)))),
    Form("zero point 3 of the weight", spoiled(lambda s: put(s, 3, np.full(N, 3, dtype=np.int8)))),
    Form("a scale of 0", spoiled(lambda s: put(s, 0, np.asarray(0, dtype=np.float16)))),
    Form("a negative weight scale", spoiled(lambda s: put(s, 2, np.full(N, -0.01, dtype=np.float16)))),
    Form(
        "127 scales for 128 channels",
        spoiled(lambda s: put(s, 2, np.full(N - 1, 0.01, dtype=np.float16)) or put(s, 3, np.zeros(N - 1, dtype=np.int8))),
    ),
    Form("float32 activation scale in float16", spoiled(lambda s: put(s, 0, np.asarray(0.05, dtype=np.float32)))),
    Form("int16 codes", spoiled(lambda s: put(s, 4, np.ones((K, N), dtype=np.int16)) or put(s, 3, np.zeros(N, dtype=np.int16)))),
    Form("uint4 codes", weight_only(np.dtype(ml_dtypes.uint4), (2, N), **B4)),
    Form("float8 e5m2 codes", weight_only(np.dtype(ml_dtypes.float8_e5m2), (N,), axis=1)),
    Form("blocks along two axes", weight_only(INT4, (2, 2), **B4)),
    Form("MatMulInteger", lambda: foreign("MatMulInteger")),
    Form("QLinearMatMul", lambda: foreign("QLinearMatMul")),
    Form("DynamicQuantizeLinear", lambda: foreign("DynamicQuantizeLinear")),
    Form("uint8 codes, zero point 0", spoiled(lambda s: put(s, 1, np.asarray(0, dtype=np.uint8))), trap=True),
    Form("int4 activation", activated(0.5, INT4, INT8), trap=True),
    Form("block_size 96 of 128 inputs", weight_only(INT4, (2, N), axis=0, block_size=96), trap=True),
)


def static_verdict(form: Form) -> tuple[str, str]:
    """The checker's verdict and its reason, for sm89 and sm120."""
    findings = check(form.make(), "trt-rtx", ("sm89", "sm120"))
    found = next((item for item in findings if item.node == "gemm"), None) or next(iter(findings), None)
    return (found.verdict, found.rule) if found else ("float", "nothing quantized")


def real_verdict(form: Form, folder: Path) -> tuple[str, str]:
    """What the builder does: refuses, or a GEMM in low precision or not; and its own words."""
    path = folder / "form.onnx"
    model = form.make()
    ir.save(model, path)
    shapes = (1, TOKENS, K), (2, TOKENS, K), (4, TOKENS, K)
    request = PlanRequest(
        module="tensorrt_rtx", model=str(path), plan=str(folder / "plan"), targets=("SM89", "SM120"), profiles={"x": shapes}
    )
    try:
        report = build_plan(request, lambda done, total: None)
    except BackendError as error:
        return "rejected", str(error)
    kernel, precision = kernel_of(read_layers(report.layers), "gemm")
    return ("low precision" if precision else "float"), kernel


def main() -> None:
    wrong = 0
    print("| form | checker | TensorRT-RTX | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            said, rule = static_verdict(form)
            real, words = real_verdict(form, Path(folder))
            right = said == "rejected" if form.trap else said == real
            wrong += not right
            note = "takes it, with other numbers" if form.trap else "" if right else f"**wrong**: {rule}; {words[:200]}"
            print(f"| {form.name} | {said} | {real} | {note} |", flush=True)
    print(f"{len(FORMS)} forms, {wrong} wrong verdicts")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
