"""TensorRT-RTX: real plans, built without a GPU and audited by the builder's own list of layers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, feed_of, load_graph, recipe_of, run_onnx, save_tiny, sqnr

from dq_export.deploy.backend import BackendError, NotHereError, unwatched
from dq_export.deploy.tensorrt.backend import TensorRt, TensorRtRtx
from dq_export.deploy.tensorrt.builder import PlanRequest, build_plan
from dq_export.deploy.tensorrt.layers import read_layers
from dq_export.deploy.tensorrt.runner import compute_capability
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference
from dq_export.finished_folder import engine_of
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes

RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
TARGETS = ("sm89", "sm120")


def rtx(dtype: str = "fp16", **options: Any) -> TensorRt:
    return TensorRtRtx(dtype=dtype, targets=TARGETS, **options)


def legalised(path: Path, calibrated: Any, backend: TensorRt, target: Path) -> Path:
    graph = load_graph(path)
    graph.ir_version = 10
    run_passes(graph, (*canonical_passes(*calibrated), *backend.legalise(shared=False, result=calibrated[0])))
    ir.save(graph, target)
    return target


@pytest.fixture(scope="module")
def calibrations(tiny: Reference) -> dict[str, Any]:
    actual = {}
    for bits in ("w8a8", "fp8", "w4a16"):
        actual[bits] = calibrate_tiny(tiny, recipe_of(tiny, bits=bits, scaling="smooth", bins="per-step"))
    return actual


@RTX
@pytest.mark.parametrize(
    ("bits", "dtype", "kernels"),
    [
        ("w8a8", "fp16", {"gemm Int8xInt8"}),
        ("w8a8", "bf16", {"gemm Int8xInt8"}),
        ("w8a8", "fp32", {"gemm Int8xInt8"}),
        ("fp8", "fp16", {"gemm FP8xFP8"}),
        ("fp8", "fp32", {"gemm FP8xFP8"}),
        ("w4a16", "fp16", set()),
        ("w4a16", "bf16", set()),
    ],
)
def test_every_gemm_of_the_recipe_is_low_precision_in_the_plan(
    bits: str, dtype: str, kernels: set[str], tiny: Reference, tiny_onnx_per_sample: Path, calibrations: Any, tmp_path: Path
) -> None:
    backend = rtx(dtype)
    model = legalised(tiny_onnx_per_sample, calibrations[bits], backend, tmp_path / "model.onnx")
    audit = backend.audit(backend.build(model, tmp_path / "engine"), calibrations[bits][1])
    assert audit.coverage == 1
    actual = {gemm.kernel for gemm in audit.gemms if gemm.wanted == bits}
    assert actual == kernels or (not kernels and all("Int4" in kernel for kernel in actual)), actual
    assert not any(gemm.integer for gemm in audit.gemms if gemm.wanted in ("none", "float"))
    described = json.loads((tmp_path / "engine" / "plan.json").read_text())
    assert described["targets"] == list(TARGETS)
    assert described["profiles"]["hidden_states"] == [[1, 2, 8, 8], [2, 2, 8, 8], [16, 2, 8, 8]]
    assert (tmp_path / "engine" / "model.plan").read_bytes()[:4] == b"vtrt"


@RTX
@pytest.mark.parametrize("bits", ["w8a8", "fp8"])
def test_attention_in_float8_is_one_fused_kernel(bits: str, tmp_path: Path) -> None:
    reference = load_reference(str(save_tiny(tmp_path, sample_size=16)))  # 64 tokens: of 16 the builder fuses none
    reference.export_onnx(tmp_path / "float.onnx", shared=False)
    recipe = recipe_of(reference, bits=bits, attention="fp8", bins="per-step")
    calibrated = calibrate_tiny(reference, recipe)
    model = legalised(tmp_path / "float.onnx", calibrated, rtx(), tmp_path / "model.onnx")
    audit = rtx().audit(rtx().build(model, tmp_path / "engine"), calibrated[1])
    attention = [gemm for gemm in audit.gemms if "." not in gemm.name and gemm.wanted == "fp8"]
    assert len(attention) == 4
    assert audit.coverage == 1
    layers = read_layers((tmp_path / "engine" / "layers.txt").read_text())
    fused = [layer for layer in layers if layer.attention]
    assert len(fused) == 2
    assert all(layer.precision == "FP8" for layer in fused)


@RTX
def test_run_time_scales_build_and_the_audit_finds_them_in_half(tiny_onnx: Path, calibrations: Any, tmp_path: Path) -> None:
    graph = load_graph(tiny_onnx)
    graph.ir_version = 10
    run_passes(graph, canonical_passes(*calibrations["w8a8"]))  # direct form
    ir.save(graph, tmp_path / "model.onnx")
    built = rtx("fp32").build(tmp_path / "model.onnx", tmp_path / "engine")
    audit = rtx("fp32").audit(built, calibrations["w8a8"][1])
    assert audit.coverage == 0
    assert all(gemm.reason == "a scale that is computed at run time" for gemm in audit.gemms if gemm.wanted == "w8a8")


@RTX
def test_two_builds_give_the_same_bytes(tiny_onnx_per_sample: Path, calibrations: Any, tmp_path: Path) -> None:
    model = legalised(tiny_onnx_per_sample, calibrations["w8a8"], rtx(), tmp_path / "model.onnx")
    for name in ("one", "two"):
        rtx().build(model, tmp_path / name)
    assert (tmp_path / "one" / "model.plan").read_bytes() == (tmp_path / "two" / "model.plan").read_bytes()


@pytest.fixture(scope="module")
def exported(tiny_onnx_per_sample: Path, calibrations: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    model = legalised(tiny_onnx_per_sample, calibrations["w8a8"], rtx(), folder / "model.onnx")
    rtx().build(model, folder / "engine")
    return folder


@RTX
def test_a_plan_without_a_gpu_is_an_error(exported: Path) -> None:
    if compute_capability():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match="a plan runs on an NVIDIA GPU, and this machine shows none"):
        rtx().load(engine_of(exported))


@RTX
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("version", "was built by tensorrt_rtx 0.9, but tensorrt_rtx 1."),
        ("bytes", "was changed after the build; run `dq-export finish"),
        ("missing", "no model.plan; run `dq-export finish"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(spoil: str, message: str, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    engine = tmp_path / "out" / "engine"
    if spoil == "version":
        described = json.loads((engine / "plan.json").read_text())
        (engine / "plan.json").write_text(json.dumps({**described, "library": "tensorrt_rtx 0.9"}))
    elif spoil == "bytes":
        (engine / "model.plan").write_bytes((engine / "model.plan").read_bytes()[:-1])
    else:
        (engine / "model.plan").unlink()
    with pytest.raises(BackendError) as error:
        rtx().load(engine_of(tmp_path / "out"))
    assert message in str(error.value)


@RTX
def test_a_killed_build_is_reported(exported: Path, tmp_path: Path) -> None:
    """As the kernel does where memory runs out."""

    def kill() -> None:
        while True:
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except (OSError, IndexError):
                    continue
                if b"dq_export.deploy.tensorrt.builder" in words and parent == os.getpid():
                    os.kill(int(entry.name), signal.SIGKILL)
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(BackendError, match="was killed, most likely for lack of memory"):
        rtx().build(exported / "model.onnx", tmp_path / "engine")
    killer.join()


@RTX
def test_the_builders_message_reaches_the_user(tiny_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(load_and_spoil(tiny_onnx))
    with pytest.raises(
        BackendError, match=r"will not build for --format trt-rtx:\n  'odd': MatMulInteger is not imported; write"
    ):
        rtx().build(tmp_path / "model.onnx", tmp_path / "engine")
    request = PlanRequest(
        module="tensorrt_rtx", model=str(tmp_path / "model.onnx"), plan=str(tmp_path / "p"), targets=("SM89",), profiles={}
    )
    with pytest.raises(BackendError, match=r"tensorrt_rtx cannot build .*model.onnx: .*at node 'odd' \(MatMulInteger\)"):
        build_plan(request, unwatched)


def load_and_spoil(path: Path) -> bytes:
    graph = load_graph(path)
    first = next(iter(graph.graph))
    source = graph.graph.initializers[next(iter(graph.graph.initializers))]
    cast = ir.node("Cast", [source], attributes={"to": ir.DataType.INT8.value}, name="narrow")
    odd = ir.node("MatMulInteger", [cast.outputs[0], cast.outputs[0]], name="odd")
    graph.graph.insert_before(first, [cast, odd])
    graph.ir_version = 10
    return ir.serde.serialize_model(graph).SerializeToString()


@pytest.mark.parametrize(("dtype", "minimum"), [("fp16", 45), ("bf16", 30)])
def test_the_legalised_graph_computes_what_the_float32_one_does(
    dtype: str, minimum: float, tiny: Any, tiny_onnx_per_sample: Path, calibrations: Any, tmp_path: Path
) -> None:
    exact = legalised(tiny_onnx_per_sample, calibrations["w8a8"], rtx("fp32"), tmp_path / "wide.onnx")
    model = legalised(tiny_onnx_per_sample, calibrations["w8a8"], rtx(dtype), tmp_path / "model.onnx")
    portable = rtx(dtype).portable(model, tmp_path / "portable")
    assert (portable == model) == (dtype == "fp16")
    feed = feed_of(tiny, [20, 500, 900])
    # Some 40 roundings of 2^-11 or 2^-8 of a value each, and codes next to a boundary that fall on its other side.
    assert sqnr(run_onnx(exact, feed), run_onnx(portable, feed)) > minimum


def test_float16_gemms_stay_in_range(tiny_onnx_per_sample: Path, calibrations: Any, tmp_path: Path) -> None:
    """TensorRT stores c times the sum of products in float16: c must be small enough for rows as long as those of calibration."""
    result = calibrations["w8a8"][0]
    assert min(result.reach.values()) > 1000  # so that a c of some 0.05 needs looking at
    large = result.__class__(
        sites=result.sites, weight_scale=result.weight_scale, provenance={}, reach=dict.fromkeys(result.reach, 100000000.0)
    )
    graph = load_graph(tiny_onnx_per_sample)
    run_passes(graph, (*canonical_passes(large, calibrations["w8a8"][1]), *rtx().legalise(shared=False, result=large)))
    scales = [node.inputs[1].const_value.numpy() for node in graph.graph if node.op_type == "QuantizeLinear"]  # type: ignore[union-attr]
    assert len(scales) == 8
    assert all(float(scale) * 1e8 <= 65504 / 2 * (1 + 2**-10) for scale in scales)


def test_without_tensorrt_it_says_how_to_go_on(tiny_onnx_per_sample: Path, calibrations: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed here")
    backend = TensorRt("fp16")
    backend.require()
    model = legalised(tiny_onnx_per_sample, calibrations["w8a8"], backend, tmp_path / "model.onnx")
    with pytest.raises(NotHereError, match=r"tensorrt is not installed here; [\s\S]* && dq-export finish "):
        backend.build(model, tmp_path / "engine")


def test_numpy_is_enough_for_the_graph() -> None:
    assert np.dtype(ir.DataType.FLOAT8E4M3FN.numpy()).itemsize == 1
