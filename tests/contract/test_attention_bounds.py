"""The bounds of attention's operands, for float8, hold in every family's network, and are near what is computed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cases import CASES, loaded
from conftest import feed_of, load_graph, run_onnx, sqnr
from flux import save_flux
from sd3 import save_sd3
from toy import PROMPTS

import dq_export
from dq_export.core.qtypes import FP8
from dq_export.passes.analysis.bounds import bound
from dq_export.passes.base import run_passes
from dq_export.passes.canonical.fold_transpose import FoldTranspose
from dq_export.passes.legalise.quantize_attention import QuantizeAttention
from dq_export.passes.match import linears

NORMALIZED = ("sd3", "flux", "flux2")
"""Families whose queries and keys are normalized head by head."""


def greatest(model: ir.Model, values: list[ir.Value], feed: dict[str, Any]) -> dict[str, float]:
    """The greatest |element| of values of a graph, by name."""
    names = [str(value.name) for value in values]
    present = {output.name for output in model.graph.outputs}
    model.graph.outputs.extend(value for value in dict.fromkeys(values) if value.name not in present)
    content = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    return {name: float(np.abs(array).max()) for name, array in zip(names, session.run(names, feed), strict=True)}


def operands(model: ir.Model) -> list[ir.Value]:
    """Query, key and value of every attention."""
    values: list[ir.Value | None] = []
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        assert softmax.inputs[0] is not None
        scores = softmax.inputs[0].producer()
        ((product, _),) = softmax.outputs[0].uses()
        assert scores is not None
        values += [*scores.inputs, product.inputs[1]]
    return [value for value in values if value is not None]


@pytest.mark.parametrize(
    "name", ["dit", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "flux2", "unet"))]
)
def test_bounds_hold_and_attention_is_quantized(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    reference = loaded(case.save(tmp_path / "model"), case)
    reference.export_onnx(tmp_path / "float.onnx", shared=True)
    feed = feed_of(reference)
    model = load_graph(tmp_path / "float.onnx")
    run_passes(model, [FoldTranspose()])  # linears are found with their weights [in, out]
    results = {node.output: module for module, node in linears(model).items()}
    values = operands(model)
    actual = greatest(model, [*results, *values], feed)
    results_bounds = {value: actual[str(value.name)] for value in results}
    bounds = [bound(value, results_bounds) for value in values]
    assert len(values) >= 6
    for value, number in zip(values, bounds, strict=True):
        assert number is not None, value.name
        assert actual[str(value.name)] <= number * (1 + 1e-5) < 16 * actual[str(value.name)], value.name
    measured = {module: actual[str(value.name)] / FP8.qmax for value, module in results.items()}
    read = {module for group in reference.attention for module in group}
    model = load_graph(tmp_path / "float.onnx")
    (report,) = run_passes(model, [QuantizeAttention(scales={module: measured[module] for module in read})])
    assert len(report.changed) == len(values) // 3 == len(reference.attention)
    assert any(module.endswith(("to_q", "to_k")) for module in read) != (name in NORMALIZED)
    assert sqnr(reference.forward(feed), run_onnx(model, feed)) > 25


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_plan_multiplies_joint_attention_in_float8(name: str, tmp_path: Path) -> None:
    heads: dict[str, dict[str, Any]] = {
        "sd3": {"attention_head_dim": 64, "caption_projection_dim": 128},
        "flux": {"attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]},
    }
    save = {"sd3": save_sd3, "flux": save_flux}[name]
    save(tmp_path / "model", **heads[name])
    options: dict[str, Any] = {"format": "trt-rtx", "target": "sm89", "attention": "fp8", "steps": 3, "calib_size": 2}
    sizes = {"sizes": "256x256"} if name == "flux" else {}
    report = dq_export.export(
        model=str(tmp_path / "model"), output_dir=tmp_path / "out", prompts=PROMPTS, parity_size=2, **options, **sizes
    )
    assert report.audit is not None
    assert report.audit.integer_share > 0.97
