"""The pass integer_gemms on graphs of a few nodes: what it writes, what ONNX Runtime makes of it, and where it must not act."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import run_onnx
from small_graphs import RANDOM, Builder, unchanged

from dq_export.passes.base import run_passes
from dq_export.passes.legalise.integer_gemms import IntegerGemms

FEED = {"x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32), "t": np.asarray(1, dtype=np.int64)}


def quantized_linear(
    *, table: bool = False, bias_first: bool = False, weight_scales: int = 4, codes: type = np.int8, scales: int = 0
) -> ir.Model:
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), t=(ir.DataType.INT64, []))
    zero = b.const("zero", np.uint8(128))
    scale = b.const("s", np.float32(0.02) if not scales else np.full(scales, 0.02, np.float32))
    if table:
        scale = b.node("Gather", b.const("table", np.asarray([0.01, 0.02], np.float32)), b.value["t"], shape=[])
    quantized = b.node("QuantizeLinear", b.value["x"], scale, zero, shape=["B", 3, 8])
    quantized.dtype = ir.DataType.UINT8
    activation = b.node("DequantizeLinear", quantized, scale, zero, shape=["B", 3, 8])
    rows = b.const("codes", RANDOM.integers(-99, 99, (8, 4)).astype(codes))
    unit = RANDOM.random(weight_scales or 1).astype(np.float32)
    units, point = (
        b.const("v", unit if weight_scales else unit[0]),
        b.const("w0", np.zeros(unit.shape if weight_scales else (), codes)),
    )
    weight = b.node("DequantizeLinear", rows, units, point, shape=[8, 4])
    product = b.node("MatMul", activation, weight, module="fc0", shape=["B", 3, 4])
    bias = b.const("b", RANDOM.normal(size=4).astype(np.float32))
    return b.model(b.node("Add", *((bias, product) if bias_first else (product, bias)), module="fc0", shape=["B", 3, 4]))


def kernels(model: ir.Model, folder: Path) -> list[tuple[str, int]]:
    """The operators that ONNX Runtime runs, each with the number of its inputs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ir.save(model, folder / "model.onnx")
    onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return [(node.op_type, len(node.inputs)) for node in ir.load(folder / "optimized.onnx").graph]


@pytest.mark.parametrize("table", [False, True], ids=["constant", "table"])
@pytest.mark.parametrize("bias_first", [False, True], ids=["bias last", "bias first"])
def test_bias_and_scale_are_part_of_the_integer_kernel(table: bool, bias_first: bool, tmp_path: Path) -> None:
    model = quantized_linear(table=table, bias_first=bias_first)
    before = run_onnx(model, FEED)
    assert ("Add", 2) in kernels(model, tmp_path), "what the pass is for: without it the bias is added apart"
    run_passes(model, [IntegerGemms()])
    np.testing.assert_allclose(run_onnx(model, FEED), before, rtol=0, atol=1e-6 * np.abs(before).max())
    operators = kernels(model, tmp_path)
    assert ("MatMulIntegerToFloat", 7) in operators
    assert not {"Add", "Cast", "Mul", "MatMulInteger"} & {name for name, _ in operators}


def test_integer_gemms_must_not_act() -> None:
    float_gemm = quantized_linear()
    gemm = next(node for node in float_gemm.graph if node.op_type == "MatMul")
    gemm.replace_input_with(0, float_gemm.graph.inputs[0])
    half = quantized_linear()
    next(node for node in half.graph if node.op_type == "MatMul").outputs[0].dtype = ir.DataType.FLOAT16
    for model, case in (
        (float_gemm, "case 1"),
        (quantized_linear(scales=8), "case 2"),
        (quantized_linear(weight_scales=0), "case 2"),
        (half, "case 3"),
    ):
        assert f": {case}: " in unchanged(model, IntegerGemms())
