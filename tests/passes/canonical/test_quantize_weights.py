"""The pass quantize_weights on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from small_graphs import BLOCKS, FLOAT, W8A8, linear_model, listing, modulated, result_of, site_of, unchanged

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.rule import Rule
from dq_export.passes.base import GraphError, run_passes
from dq_export.passes.canonical.quantize_weights import QuantizeWeights
from dq_export.passes.match import linears


def test_quantize_weights() -> None:
    model = linear_model([1])
    result = result_of(site_of(), 8)
    run_passes(model, [QuantizeWeights(result=result, assigned={"fc0": W8A8})])
    assert listing(model) == [
        "DequantizeLinear(fc0.weight_codes, fc0.weight_scale, fc0.weight_zero_point)",
        "MatMul(x, DequantizeLinear)",
    ]
    zero = model.graph.initializers["fc0.weight_zero_point"].const_value
    assert zero is not None
    assert zero.dtype == ir.DataType.INT8


def test_codes_of_two_levels_are_8_bit_codes_at_every_step() -> None:
    """A runtime holds the results of these nodes for all weights at once; a step of 32 bits took four times the memory."""
    model, rule = linear_model([1]), Rule(match="", action="w4a8", group_size=4)
    result = replace(result_of(site_of(), 8), multiplier={"fc0": np.arange(1, 17, dtype=np.int8).reshape(2, 8)})
    reader = linears(model)["fc0"].weight_reader()
    grid = result.grid("fc0", rule.scheme.weight.qtype)
    run_passes(model, [QuantizeWeights(result=result, assigned={"fc0": rule})])
    assert listing(model) == [
        "Cast(fc0.weight_codes)",
        "Reshape(Cast, fc0.weight_blocks)",
        "Mul(Reshape, fc0.weight_multiplier)",
        "Reshape(Mul, fc0.weight_shape)",
        "DequantizeLinear(Reshape, fc0.weight_scale, fc0.weight_zero_point)",
        "MatMul(x, DequantizeLinear)",
    ]
    cast, _, _, joined, dequantize, _ = model.graph
    assert cast.attributes.get_int("to") == ir.DataType.INT8.value
    model.graph.outputs[:] = [joined.outputs[0], dequantize.outputs[0]]
    codes, weight = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(
        None, {"x": np.zeros((1, 3, 8), np.float32), "timestep": np.zeros(1, np.int64)}
    )
    assert codes.dtype == np.int8
    assert np.array_equal(codes, (grid.codes(reader()).T.reshape(2, 4, 8) * result.multiplier["fc0"][:, None]).reshape(8, 8))
    assert np.array_equal(weight, codes * result.weight_scale["fc0"])
    assert np.abs(codes).max() > 15


def test_quantize_weights_must_not_act() -> None:
    result = result_of(site_of(), 8)
    assert "case 1" in unchanged(linear_model([1]), QuantizeWeights(result=result, assigned={"fc0": FLOAT}))
    model = linear_model([1])
    run_passes(model, [QuantizeWeights(result=result, assigned={"fc0": W8A8})])
    unchanged(model, QuantizeWeights(result=result, assigned={"fc0": W8A8}))  # case 2


def test_quantize_weights_refuses_a_gemm() -> None:
    result = CalibrationResult(sites={}, weight_scale={"norm1.linear": np.ones(16, dtype=np.float32)}, provenance={})
    with pytest.raises(GraphError, match=r"'norm1.linear' is a Gemm"):
        QuantizeWeights(result=result, assigned={"norm1.linear": BLOCKS}).rewrite(modulated())


def test_quantize_weights_refuses_scales_of_another_model() -> None:
    with pytest.raises(GraphError, match=r"'fc0': scales \(6,\) do not fit a weight \(8, 8\); calibrate again"):
        QuantizeWeights(result=result_of(site_of(), 8, out=6), assigned={"fc0": W8A8}).rewrite(linear_model([1]))
