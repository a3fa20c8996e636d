"""Attention's two matmuls in float8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, feed_of, load_graph, recipe_of, run_onnx, sqnr

from dq_export.core.qtypes import FP8
from dq_export.passes.base import PassReport, run_passes
from dq_export.passes.legalise.quantize_attention import QuantizeAttention


@pytest.fixture(scope="module")
def scales(tiny: Any) -> dict[str, float]:
    result, _ = calibrate_tiny(tiny, recipe_of(tiny, attention="fp8", scaling="none"))
    return dict(result.attention)


def quantized(path: Path, scales: dict[str, float]) -> tuple[ir.Model, PassReport]:
    model = load_graph(path)
    model.ir_version = 10
    return model, run_passes(model, [QuantizeAttention(scales=scales)])[0]


def test_all_four_operands_go_through_float8(tiny: Any, tiny_onnx: Path, scales: dict[str, float]) -> None:
    assert set(scales) == {name for names in tiny.attention for name in names}
    model, report = quantized(tiny_onnx, scales)
    assert len(report.changed) == 2
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        scores = softmax.inputs[0].producer()  # type: ignore[union-attr]
        product = next(user for node in model.graph if node.op_type == "MatMul" for user in [node] if _reads(node, softmax))
        for operand in (*scores.inputs, *product.inputs):  # type: ignore[union-attr]
            dequantize = operand.producer()  # type: ignore[union-attr]
            assert dequantize is not None
            assert dequantize.op_type == "DequantizeLinear"
            assert dequantize.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN  # type: ignore[union-attr]
            assert (scale := dequantize.inputs[1]) is not None
            assert scale.const_value is not None
    feed = feed_of(tiny)
    # Four roundings of 2^-4 relative at the most, 2^-5.8 root mean square: attention's branch keeps some 29 dB.
    assert sqnr(tiny.forward(feed), run_onnx(model, feed)) > 25


def _reads(node: ir.Node, softmax: ir.Node) -> bool:
    dequantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    quantize = dequantize.inputs[0].producer() if dequantize is not None and dequantize.inputs[0] is not None else None
    return quantize is not None and quantize.inputs[0] is softmax.outputs[0]


def test_scales_are_twice_what_the_kept_rows_reach(tiny: Any, scales: dict[str, float]) -> None:
    """Against PyTorch's own projections of the same sampling: nothing seen is clipped."""
    calls: dict[str, float] = {}
    handles = [
        tiny.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: calls.__setitem__(
                name, max(calls.get(name, 0.0), float(output.abs().max()))
            )
        )
        for name in scales
    ]
    for label in range(4):
        tiny.trajectory(np.asarray([label]), steps=5, seed=label, guidance=2.0, before=lambda feed: None)
    for handle in handles:
        handle.remove()
    for name, scale in scales.items():
        assert calls[name] < scale * FP8.qmax < 4 * calls[name]


@pytest.mark.parametrize("missing", ["to_q", "to_k", "to_v"])
def test_case_1_without_a_scale_it_stays_float(missing: str, tiny_onnx: Path, scales: dict[str, float]) -> None:
    part = {name: scale for name, scale in scales.items() if not name.endswith(missing)}
    _, report = quantized(tiny_onnx, part)
    assert report.changed == ()
    assert len(report.skipped) == 2
    assert all("no bound of its operands follows from linears with a scale (case 1)" in line for line in report.skipped)


def test_case_2_twice_is_once(tiny_onnx: Path, scales: dict[str, float]) -> None:
    model, _ = quantized(tiny_onnx, scales)
    assert run_passes(model, [QuantizeAttention(scales=scales)])[0].changed == ()
