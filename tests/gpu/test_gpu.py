"""On a machine with an NVIDIA GPU: plans and sessions run, and compute what their graph computes on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, feed_of, load_graph, recipe_of, run_onnx, sqnr

from dq_export.deploy.check.rules_nvidia import TARGETS
from dq_export.deploy.onnxruntime.cuda import OrtCuda, obstacle
from dq_export.deploy.onnxruntime.plans import OrtPlan, OrtTensorRt, OrtTensorRtRtx
from dq_export.deploy.tensorrt.backend import TensorRt, TensorRtRtx
from dq_export.deploy.tensorrt.runner import compute_capability
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", [TensorRt, TensorRtRtx, OrtTensorRt, OrtTensorRtRtx])
@pytest.mark.parametrize(
    ("bits", "dtype", "minimum"), [("w8a8", "fp16", 30), ("w8a8", "bf16", 25), ("fp8", "fp16", 25), ("w4a16", "fp16", 30)]
)
def test_a_plan_computes_what_its_graph_does(
    kind: type[TensorRt], bits: str, dtype: str, minimum: float, tiny: Any, tiny_onnx_per_sample: Path, tmp_path: Path
) -> None:
    target = compute_capability()
    if not target:
        pytest.skip("no NVIDIA GPU")
    rtx = issubclass(kind, TensorRtRtx)
    if rtx and target not in TARGETS:
        pytest.skip(f"TensorRT-RTX does not run on {target}")
    if importlib.util.find_spec(kind.module) is None:
        pytest.skip(f"{kind.module} is not installed")
    if issubclass(kind, OrtPlan) and (reason := kind(dtype).obstacle):
        pytest.skip(reason)
    result, assigned = calibrate_tiny(tiny, recipe_of(tiny, bits=bits, bins="per-step"))
    backend = kind(dtype, targets=(target,) if rtx else ())
    graph = load_graph(tiny_onnx_per_sample)
    graph.ir_version = 10
    run_passes(graph, (*canonical_passes(result, assigned), *backend.legalise(shared=False, result=result)))
    ir.save(graph, tmp_path / "model.onnx")
    built = backend.build(tmp_path / "model.onnx", tmp_path / "engine")
    assert backend.audit(built, assigned).coverage == 1
    feed = feed_of(tiny, [20, 500, 900])
    exact = run_onnx(backend.portable(tmp_path / "model.onnx", tmp_path / "portable"), feed)
    engine = backend.load(built)
    actual = engine(feed)
    assert np.array_equal(engine.bound(feed)(), actual)
    assert sqnr(exact, actual) > minimum  # other kernels move codes next to a boundary by one


@pytest.mark.parametrize(("bits", "dtype"), [("w4a16", "fp16"), ("w8a16", "fp16"), ("w4a16", "fp32"), ("w8a16", "fp32")])
def test_a_session_on_the_gpu_computes_what_its_graph_does(
    bits: str, dtype: str, tiny: Any, tiny_onnx: Path, tmp_path: Path
) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    result, assigned = calibrate_tiny(tiny, recipe_of(tiny, bits=bits))
    backend = OrtCuda(dtype)
    graph = load_graph(tiny_onnx)
    run_passes(graph, (*canonical_passes(result, assigned), *backend.legalise(shared=True, result=result)))
    ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    built = backend.build(tmp_path / "model.onnx", tmp_path / "engine")
    assert backend.audit(built, assigned).coverage == 1
    feed = feed_of(tiny)
    engine = backend.load(built)
    actual = engine(feed)
    assert np.array_equal(engine.bound(feed)(), actual)
    assert sqnr(run_onnx(built.model, feed), actual) > 45  # float16 rounding in another order
