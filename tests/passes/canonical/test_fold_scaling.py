"""The pass fold_scaling on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx
from small_graphs import Builder, listing, modulated, modulation_feed, result_of, unchanged

from dq_export.core.folds import explicit
from dq_export.core.network import InputSite
from dq_export.passes.analysis.sites import graph_sites
from dq_export.passes.base import GraphError, run_passes
from dq_export.passes.canonical.fold_scaling import FoldScaling


def read() -> ir.Model:
    """to_q(x * (1 + scale) + shift) with [shift, scale] = norm1.linear(c)."""
    b = Builder.of(modulated())
    q = b.node("MatMul", b.graph.outputs.pop(), b.weight("wq", 8, 8), module="to_q")
    return b.shaped(b.node("Add", q, b.weight("bq", 8), module="to_q", shape=["B", 3, 8]))


def fc2() -> tuple[ir.Model, InputSite]:
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]))
    model = b.model(b.node("MatMul", b.value["x"], b.weight("w", 8, 8), module="fc2", shape=["B", 3, 8]))
    return model, InputSite(name="fc2", linears=("fc2",), fold=explicit("fc2", 8))


def test_a_modulation_takes_the_scaling_and_the_one_that_is_added_to_it() -> None:
    model, feed = read(), modulation_feed()
    site = graph_sites(model)[-1].site
    exact = run_onnx(model, feed)
    run_passes(model, [FoldScaling(result=result_of(site, 8))])
    assert listing(model) == [
        "Gemm(c, norm1.linear.weight_1, norm1.linear.bias_1)",
        "Split(Gemm)",
        "Unsqueeze(Split, axis)",
        "Unsqueeze(Split, axis)",
        "Mul(x, Unsqueeze)",
        "Add(Mul, Unsqueeze)",
        "MatMul(Add, to_q.weight)",
        "Add(MatMul, to_q.bias)",
    ]
    np.testing.assert_allclose(run_onnx(model, feed), exact, rtol=1e-4, atol=2e-5)  # sums of about 10 terms of size 1
    assert "case 2" in unchanged(model, FoldScaling(result=result_of(site, 8)))


def test_the_one_also_moves_into_the_bias_if_nothing_is_scaled() -> None:
    model, feed = read(), modulation_feed()
    site = graph_sites(model)[-1].site
    exact = run_onnx(model, feed)
    run_passes(model, [FoldScaling(result=result_of(site, 8, scaled=False))])
    assert "Add(Unsqueeze, one)" not in listing(model)
    np.testing.assert_allclose(run_onnx(model, feed), exact, rtol=1e-5, atol=1e-6)  # one addition is done before the row's sum


def test_an_explicit_scaling_is_a_mul_and_an_add() -> None:
    model, site = fc2()
    feed = {"x": modulation_feed()["x"]}
    exact = run_onnx(model, feed)
    run_passes(model, [FoldScaling(result=result_of(site, 8))])
    assert listing(model) == [
        "Mul(x, fc2.inverse_in_scale)",
        "Add(Mul, fc2.scaled_in_shift)",
        "MatMul(Add, fc2.weight)",
        "Add(MatMul, fc2.bias)",
    ]
    np.testing.assert_allclose(run_onnx(model, feed), exact, rtol=1e-4, atol=2e-5)


def test_it_must_not_act_without_a_scaling() -> None:  # case 1
    model, site = fc2()
    assert "case 1" in unchanged(model, FoldScaling(result=result_of(site, 8, scaled=False)))


def test_a_calibration_of_another_graph_is_refused() -> None:
    model = read()
    site = replace(graph_sites(model)[-1].site, fold=explicit("to_q", 8))
    with pytest.raises(GraphError, match=r"'to_q': expected its scaling to go into a Mul on all tokens, found another place"):
        FoldScaling(result=result_of(site, 8)).rewrite(model)
    other = InputSite(name="fc1", linears=("fc1",), fold=explicit("fc1", 8))
    with pytest.raises(GraphError, match=r"the graph has no input of 'fc1'; was it exported from another model\?"):
        FoldScaling(result=result_of(other, 8)).rewrite(model)
