"""The pass merge_biases on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from conftest import run_onnx
from small_graphs import RANDOM, Builder, unchanged

from dq_export.passes.base import run_passes
from dq_export.passes.legalise.merge_biases import MergeBiases
from dq_export.passes.match import linears

FEED = {"x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32)}

EXACT = 8 * 2.0**-24 * 128
"""Of sums of codes the graph as written rounds 8 terms below 128 to float32; the operator adds them as integers."""


def quantized_model(
    *, activation: Any = 0.02, weight: Any = (0.1, 0.2, 0.05, 0.3), bias: tuple[int, ...] = (4,), users: int = 1
) -> ir.Model:
    """x [B, 3, 8] -> Q -> DQ -> MatMul(DQ [8, 4]) -> Add. A scale of None leaves the operand float."""
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]))
    operand = b.value["x"]
    if activation is not None:
        scale, zero = (
            b.const("s", np.asarray(activation, dtype=np.float32)),
            b.const("z", np.full(np.shape(activation), 128, np.uint8)),
        )
        codes = b.node("QuantizeLinear", operand, scale, zero, shape=["B", 3, 8], axis=2)
        codes.dtype = ir.DataType.UINT8
        operand = b.node("DequantizeLinear", codes, scale, zero, shape=["B", 3, 8], axis=2)
    stored = b.const("codes", RANDOM.integers(-127, 128, (8, 4)).astype(np.int8))
    scales = b.const("ws", np.asarray(weight, dtype=np.float32))
    whole = b.node("DequantizeLinear", stored, scales, b.const("wz", np.zeros(np.shape(weight), np.int8)), shape=[8, 4], axis=1)
    product = b.node("MatMul", operand, whole, module="fc0", shape=["B", 3, 4])
    added = b.node("Add", product, b.const("b", RANDOM.normal(size=bias).astype(np.float32)), module="fc0", shape=["B", 3, 4])
    return b.model(added, *[b.node("Relu", product, shape=["B", 3, 4]) for _ in range(users - 1)])


def test_bias_goes_into_the_integer_gemm() -> None:
    model = quantized_model()
    before, name = run_onnx(model, FEED), linears(model)["fc0"].gemm.name
    run_passes(model, [MergeBiases()])
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "MatMulIntegerToFloat"]
    linear = linears(model)["fc0"]
    assert linear.gemm.name == name, "an audit finds the operator by the name of the MatMul"
    assert linear.output is model.graph.outputs[0]
    bias = linear.bias_tensor()
    assert bias is not None
    assert bias.shape.numpy() == (4,)
    np.testing.assert_allclose(run_onnx(model, FEED), before, rtol=0, atol=EXACT)


def test_one_scale_for_the_whole_weight() -> None:
    model = quantized_model(weight=0.1)
    before = run_onnx(model, FEED)
    run_passes(model, [MergeBiases()])
    assert "MatMul" not in [node.op_type for node in model.graph]
    np.testing.assert_allclose(run_onnx(model, FEED), before, rtol=0, atol=EXACT)


def test_codes_of_four_bits_that_a_cast_widens_are_still_a_linear() -> None:
    model = quantized_model()
    weight = linears(model)["fc0"].gemm.inputs[1].producer()
    assert weight is not None
    cast = ir.node("Cast", [weight.inputs[0]], attributes={"to": ir.DataType.INT8}, name="widen")
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.INT8, ir.Shape([8, 4])
    model.graph.insert_before(weight, cast)
    weight.replace_input_with(0, cast.outputs[0])
    run_passes(model, [MergeBiases()])
    assert linears(model)["fc0"].gemm.op_type == "MatMulIntegerToFloat"


def test_it_must_not_act() -> None:
    for model, case in (
        (quantized_model(activation=None), "case 1"),
        (quantized_model(activation=[0.02] * 8), "case 2"),
        (quantized_model(bias=(3, 4)), "case 3"),
        (quantized_model(users=2), "case 3"),
    ):
        assert f": {case}: " in unchanged(model, MergeBiases())
