"""The pass fold_scaling on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx
from small_graphs import Builder, listing, modulated, modulation_feed, result_of, unchanged

from dq_export.core.network import InputSite
from dq_export.passes.base import GraphError, initializer, run_passes
from dq_export.passes.canonical.fold_scaling import FoldScaling
from dq_export.passes.match import SCOPES


def test_fold_scaling_into_the_modulation_and_explicitly() -> None:
    b = Builder(c=(ir.DataType.FLOAT, ["B", 4]), x=(ir.DataType.FLOAT, ["B", 3, 8]))
    mod = b.node("Gemm", b.value["c"], b.weight("w", 16, 4), b.weight("bias", 16), module="norm1.linear", transB=1)
    shift, gain = b.node("Split", mod, outputs=2, axis=1, num_outputs=2)
    axis = b.const("axis", np.asarray([1]))
    h = b.node("Add", b.node("Mul", b.value["x"], b.node("Unsqueeze", gain, axis)), b.node("Unsqueeze", shift, axis))
    q = b.node("MatMul", h, b.weight("wq", 8, 8), module="to_q")
    model = b.model(b.node("Add", q, b.weight("bq", 8), module="to_q", shape=["B", 3, 8]))
    feed = modulation_feed()
    exact = run_onnx(model, feed)
    site = InputSite(
        name="to_q", linears=("to_q",), fold="modulation", producer="norm1.linear", shift_rows=(0, 8), scale_rows=(8, 16)
    )
    nodes = listing(model)
    run_passes(model, [FoldScaling(result=result_of(site, 8))])
    assert [line.split("(")[0] for line in listing(model)] == [line.split("(")[0] for line in nodes], "F1 adds no node"
    np.testing.assert_allclose(run_onnx(model, feed), exact, rtol=1e-4, atol=2e-5)  # sums of about 10 terms of size 1
    again = FoldScaling(result=result_of(site, 8)).rewrite(model)
    assert "case 2" in again.skipped[0]
    explicit = InputSite(name="fc2", linears=("fc2",), fold="explicit")
    other = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]))
    model = other.model(other.node("MatMul", other.value["x"], other.weight("w", 8, 8), module="fc2", shape=["B", 3, 8]))
    exact = run_onnx(model, {"x": feed["x"]})
    run_passes(model, [FoldScaling(result=result_of(explicit, 8))])
    assert listing(model) == [
        "Mul(x, fc2.inverse_in_scale)",
        "Add(Mul, fc2.scaled_in_shift)",
        "MatMul(Add, fc2.weight)",
        "Add(MatMul, fc2.bias)",
    ]
    np.testing.assert_allclose(run_onnx(model, {"x": feed["x"]}), exact, rtol=1e-4, atol=2e-5)


def test_fold_scaling_must_not_act_without_a_scaling() -> None:  # case 1
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]))
    model = b.model(b.node("MatMul", b.value["x"], b.weight("w", 8, 8), module="fc2", shape=["B", 3, 8]))
    site = InputSite(name="fc2", linears=("fc2",), fold="explicit")
    assert "case 1" in unchanged(model, FoldScaling(result=result_of(site, 8, scaled=False)))


def test_fold_scaling_needs_the_one_absorbed() -> None:
    site = InputSite(name="q", linears=("q",), fold="modulation", producer="norm1.linear", shift_rows=(0, 8), scale_rows=(8, 16))
    model = modulated()
    graph = model.graph
    wq = initializer(graph, "wq", np.eye(8, dtype=np.float32))
    matmul = ir.node(
        "MatMul", [graph.outputs[0], wq], name="q", metadata_props={SCOPES: repr(["", "transformer", "transformer.q", "l"])}
    )
    graph.append(matmul)
    with pytest.raises(GraphError, match=r"'1 \+' of adaLN is not absorbed"):
        FoldScaling(result=result_of(site, 8)).rewrite(model)
