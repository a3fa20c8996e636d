"""The pass lift_modulation on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from conftest import run_onnx
from small_graphs import BLOCKS, FLOAT, Builder, listing, modulated, modulation_feed, unchanged

from dq_export.passes.base import run_passes
from dq_export.passes.canonical.lift_modulation import LiftModulation


def test_lift_modulation() -> None:
    model, feed = modulated(), modulation_feed()
    before = run_onnx(model, feed)
    run_passes(model, [LiftModulation(assigned={"norm1.linear": BLOCKS})])
    assert listing(model) == [
        "Unsqueeze(c, norm1.linear.token_axis)",
        "MatMul(Unsqueeze, norm1.linear.weight)",
        "Add(MatMul, bias)",
        "Split(Add)",
        "Add(Split, one)",
        "Mul(x, Add)",
        "Add(Mul, Split)",
    ]
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=1e-5, atol=1e-6)  # another kernel for the same sums


def test_lift_modulation_must_not_act() -> None:
    assert unchanged(modulated(), LiftModulation(assigned={"norm1.linear": FLOAT})) == ""  # case 1


def test_a_row_that_anything_else_reads_is_lifted_alone() -> None:
    b = Builder(c=(ir.DataType.FLOAT, ["B", 4]))
    mod = b.node("Gemm", b.value["c"], b.weight("w", 16, 4), b.weight("b", 16), module="norm1.linear", transB=1)
    one, two = b.node("Split", mod, outputs=2, axis=1, num_outputs=2)
    model = b.model(b.node("Mul", one, two, shape=["B", 8]))
    feed = {"c": np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)}
    before = run_onnx(model, feed)
    run_passes(model, [LiftModulation(assigned={"norm1.linear": BLOCKS})])
    assert listing(model)[:5] == [
        "Unsqueeze(c, norm1.linear.token_axis)",
        "MatMul(Unsqueeze, norm1.linear.weight)",
        "Add(MatMul, b)",
        "Squeeze(Add, norm1.linear.token_axis)",
        "Split(Squeeze)",
    ]
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=1e-5, atol=1e-6)


def test_a_row_that_is_the_output_keeps_its_name() -> None:
    b = Builder(c=(ir.DataType.FLOAT, ["B", 4]))
    row = b.node("Gemm", b.value["c"], b.weight("w", 16, 4), b.weight("b", 16), module="text", transB=1, shape=["B", 16])
    model = b.model(row)
    name = model.graph.outputs[0].name
    feed = {"c": np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)}
    before = run_onnx(model, feed)
    run_passes(model, [LiftModulation(assigned={"text": BLOCKS})])
    assert [node.op_type for node in model.graph] == ["Unsqueeze", "MatMul", "Add", "Squeeze"]
    assert model.graph.outputs[0].name == name
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=1e-5, atol=1e-6)
