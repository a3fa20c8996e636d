"""The pass raise_biases on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from conftest import run_onnx
from small_graphs import RANDOM, Builder, unchanged

from dq_export.passes.base import run_passes
from dq_export.passes.legalise.raise_biases import RaiseBiases


def biased_model(rank: int, *, dequantized: bool = True, bias_shape: tuple[int, ...] = (4,), users: int = 1) -> ir.Model:
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8][-rank:]))
    weight = b.const(
        "codes" if dequantized else "weight", RANDOM.integers(-9, 9, (8, 4)).astype(np.int8 if dequantized else np.float32)
    )
    if dequantized:
        weight = b.node("DequantizeLinear", weight, b.const("s", np.float32(0.1)), b.const("z", np.int8(0)), shape=[8, 4])
    shape = ["B", 3, 4][-rank:]
    product = b.node("MatMul", b.value["x"], weight, module="fc0", shape=shape)
    bias = b.const("b", RANDOM.normal(size=bias_shape).astype(np.float32))
    outputs = [b.node("Add", bias, product, module="fc0", shape=shape)]
    outputs += [b.node("Relu", product, shape=shape) for _ in range(users - 1)]
    return b.model(*outputs)


def test_raise_biases() -> None:
    model = biased_model(3)
    feed = {"x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32)}
    before = run_onnx(model, feed)
    run_passes(model, [RaiseBiases()])
    add = next(node for node in model.graph if node.op_type == "Add")
    assert [list(value.shape or ()) for value in add.inputs if value is not None and value.const_value is not None] == [[1, 1, 4]]
    np.testing.assert_array_equal(run_onnx(model, feed), before)


def test_raise_biases_must_not_act() -> None:
    for model, case in (
        (biased_model(2), "case 1"),  # the bias would add a dimension to the result
        (biased_model(3, bias_shape=(3, 4)), "case 2"),
        (biased_model(3, bias_shape=(1, 1, 4)), "case 2"),
        (biased_model(3, users=2), "case 2"),
        (biased_model(3, dequantized=False), "case 3"),
    ):
        assert f": {case}: " in unchanged(model, RaiseBiases())
