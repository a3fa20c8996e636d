"""The pass quantize_weights on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import BLOCKS, FLOAT, W8A8, linear_model, listing, modulated, result_of, site_of, unchanged

from dq_export.core.artifacts import CalibrationResult
from dq_export.passes.base import GraphError, run_passes
from dq_export.passes.canonical.quantize_weights import QuantizeWeights


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
