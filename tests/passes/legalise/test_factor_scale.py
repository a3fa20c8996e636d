"""The pass factor_scale on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx
from small_graphs import RANDOM, W8A8, Builder, linear_model, listing, result_of, site_of, unchanged

from dq_export.core.scales import TokenScale
from dq_export.passes.base import run_passes
from dq_export.passes.canonical.insert_qdq import InsertQdq
from dq_export.passes.legalise.factor_scale import FactorScale


@pytest.mark.parametrize("timestep", [[1], ["B"]], ids=["shared", "per-sample"])
def test_factor_scale(timestep: list[Any]) -> None:
    model = linear_model(timestep)
    run_passes(model, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    feed = {
        "x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32),
        "timestep": np.asarray([150] if timestep == [1] else [150, 50]),
    }
    direct = run_onnx(model, feed)
    run_passes(model, [FactorScale(result=result_of(site_of(), 8))])
    actual = listing(model)
    assert "QuantizeLinear(Mul, fc0.activation_constant_scale, fc0.activation_zero_point)" in actual
    assert actual[-1] == ("Mul(MatMul, Gather)" if timestep == [1] else "Mul(MatMul, Unsqueeze)")
    np.testing.assert_allclose(run_onnx(model, feed), direct, rtol=1e-5, atol=1e-5)  # no value sits on a boundary here


def test_factor_scale_must_not_act() -> None:
    static, one = linear_model([1]), result_of(site_of(), 8, bins=1)
    run_passes(static, [InsertQdq(result=one, assigned={"fc0": W8A8})])
    assert unchanged(static, FactorScale(result=one)) == ""  # case 1
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), s=(ir.DataType.FLOAT, []))
    zero = b.const("zero", np.int8(0))
    scale = b.node("Abs", b.value["s"])
    codes = b.node("QuantizeLinear", b.value["x"], scale, zero)
    model = b.model(b.node("DequantizeLinear", codes, scale, zero, shape=["B", 3, 8]))
    assert "case 2" in unchanged(model, FactorScale(result=result_of(site_of(), 8)))
    read = linear_model([1])
    run_passes(read, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    dequantized = next(node for node in read.graph if node.op_type == "DequantizeLinear")
    read.graph.append(ir.node("Relu", [dequantized.outputs[0]], name="relu"))
    assert "case 3" in unchanged(read, FactorScale(result=result_of(site_of(), 8)))
    direct = linear_model([1])
    run_passes(direct, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    assert "case 4" in unchanged(direct, FactorScale(result=result_of(site_of(), 8), tables=False))


@pytest.mark.parametrize("limit", [np.inf, 0.5], ids=["no-limit", "limit"])
def test_a_scale_for_each_token(limit: float) -> None:
    table = result_of(site_of(), 8)
    token = TokenScale(constant=0.0123, clip=0.9)
    result = replace(table, sites={"fc0": replace(table.sites["fc0"], activation=token)}, reach={"fc0": 100.0})
    model = linear_model(["B"])
    run_passes(model, [InsertQdq(result=result, assigned={"fc0": W8A8})])
    assert listing(model)[-3:] == [
        "QuantizeLinear(x, Mul)",
        "DequantizeLinear(QuantizeLinear, Mul)",
        "MatMul(DequantizeLinear, w0)",
    ]
    x = RANDOM.normal(size=(2, 3, 8)).astype(np.float32) * np.asarray([[1, 0.01, 0]], dtype=np.float32)[..., None]
    feed = {"x": x, "timestep": np.asarray([150, 50])}
    direct = run_onnx(model, feed)
    minimum = 0.0123 * 127 * 2.0**-13
    scale = np.maximum(np.abs(x).max(axis=2, keepdims=True), minimum) * 0.9 / 127
    codes = np.clip(np.round(x / scale), -128, 127)
    weight = model.graph.initializers["w0"].const_value
    assert weight is not None
    np.testing.assert_allclose(direct, codes * scale @ weight.numpy(), rtol=1e-5, atol=1e-6)
    assert (codes == 127).any(), "clipped"
    run_passes(model, [FactorScale(result=result, limit=limit)])
    assert listing(model)[-4:] == [
        "QuantizeLinear(Mul, fc0.activation_constant_scale, fc0.activation_zero_point)",
        "DequantizeLinear(QuantizeLinear, fc0.activation_constant_scale, fc0.activation_zero_point)",
        "MatMul(DequantizeLinear, w0)",
        "Mul(MatMul, Mul)",
    ]
    np.testing.assert_allclose(run_onnx(model, feed), direct, rtol=1e-5, atol=1e-6)
    stored = model.graph.initializers["fc0.activation_constant_scale"].const_value
    assert stored is not None
    assert float(stored.numpy()) == np.float32(min(0.0123, limit / 100))
