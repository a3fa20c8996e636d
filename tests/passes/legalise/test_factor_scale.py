"""The pass factor_scale on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx
from small_graphs import RANDOM, W8A8, Builder, linear_model, listing, result_of, site_of, unchanged

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
    run_passes(model, [FactorScale()])
    found = listing(model)
    assert "QuantizeLinear(Mul, fc0.activation_constant_scale, fc0.activation_zero_point)" in found
    assert found[-1] == ("Mul(MatMul, Gather)" if timestep == [1] else "Mul(MatMul, Unsqueeze)")
    np.testing.assert_allclose(run_onnx(model, feed), direct, rtol=1e-5, atol=1e-5)  # no value sits on a boundary here


def test_factor_scale_must_not_act() -> None:
    static = linear_model([1])
    run_passes(static, [InsertQdq(result=result_of(site_of(), 8, bins=1), assigned={"fc0": W8A8})])
    assert unchanged(static, FactorScale()) == ""  # case 1
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), s=(ir.DataType.FLOAT, []))
    zero = b.const("zero", np.int8(0))
    scale = b.node("Abs", b.value["s"])
    codes = b.node("QuantizeLinear", b.value["x"], scale, zero)
    model = b.model(b.node("DequantizeLinear", codes, scale, zero, shape=["B", 3, 8]))
    assert "case 2" in unchanged(model, FactorScale())
    read = linear_model([1])
    run_passes(read, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    dequantized = next(node for node in read.graph if node.op_type == "DequantizeLinear")
    read.graph.append(ir.node("Relu", [dequantized.outputs[0]], name="relu"))
    assert "case 3" in unchanged(read, FactorScale())
