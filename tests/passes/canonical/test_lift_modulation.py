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
    b = Builder(c=(ir.DataType.FLOAT, ["B", 4]))
    mod = b.node("Gemm", b.value["c"], b.weight("w", 16, 4), b.weight("b", 16), module="norm1.linear", transB=1)
    one, two = b.node("Split", mod, outputs=2, axis=1, num_outputs=2)
    model = b.model(b.node("Mul", one, two, shape=["B", 8]))
    assert "case 2" in unchanged(model, LiftModulation(assigned={"norm1.linear": BLOCKS}))
