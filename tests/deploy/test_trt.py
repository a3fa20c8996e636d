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

import dq_export
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.backend import BackendError, NotHereError, unwatched
from dq_export.deploy.backends import backend_of
from dq_export.deploy.tensorrt.backend import TensorRt, TensorRtRtx
from dq_export.deploy.tensorrt.builder import PlanRequest, build_plan
from dq_export.deploy.tensorrt.layers import Layer, kernel_of, read_layers
from dq_export.deploy.tensorrt.profiles import profiles
from dq_export.deploy.tensorrt.runner import PlanEngine, compute_capability
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference
from dq_export.finished_folder import engine_of
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes
from dq_export.passes.sizes import Dims

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
    found = {}
    for bits in ("w8a8", "fp8", "w4a16"):
        found[bits] = calibrate_tiny(tiny, recipe_of(tiny, bits=bits, scaling="smooth", bins="per-step"))
    return found


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
    found = {gemm.kernel for gemm in audit.gemms if gemm.wanted == bits}
    assert found == kernels or (not kernels and all("Int4" in kernel for kernel in found)), found
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
def test_a_plan_says_what_it_wants(exported: Path) -> None:
    if compute_capability():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match="a plan runs on an NVIDIA GPU, and this machine shows none"):
        rtx().load(engine_of(exported))


@RTX
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("version", "was built by tensorrt_rtx 0.9, here is tensorrt_rtx 1."),
        ("bytes", "is not the plan that was built; run `dq-export finish"),
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
    with pytest.raises(BackendError) as caught:
        rtx().load(engine_of(tmp_path / "out"))
    assert message in str(caught.value)


@RTX
def test_a_build_that_is_killed_says_so(exported: Path, tmp_path: Path) -> None:
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
    with pytest.raises(BackendError, match="was killed, most likely for want of memory"):
        rtx().build(exported / "model.onnx", tmp_path / "engine")
    killer.join()


@RTX
def test_what_the_builder_says_reaches_the_user(tiny_onnx: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("dtype", "least"), [("fp16", 45), ("bf16", 30)])
def test_the_legalised_graph_computes_what_the_float32_one_does(
    dtype: str, least: float, tiny: Any, tiny_onnx_per_sample: Path, calibrations: Any, tmp_path: Path
) -> None:
    exact = legalised(tiny_onnx_per_sample, calibrations["w8a8"], rtx("fp32"), tmp_path / "wide.onnx")
    model = legalised(tiny_onnx_per_sample, calibrations["w8a8"], rtx(dtype), tmp_path / "model.onnx")
    portable = rtx(dtype).portable(model, tmp_path / "portable")
    assert (portable == model) == (dtype == "fp16")
    feed = feed_of(tiny, [20, 500, 900])
    # Some 40 roundings of 2^-11 or 2^-8 of a value each, and codes next to a boundary that fall on its other side.
    assert sqnr(run_onnx(exact, feed), run_onnx(portable, feed)) > least


def test_float16_gemms_stay_in_range(tiny_onnx_per_sample: Path, calibrations: Any, tmp_path: Path) -> None:
    """TensorRT puts c times the sum of products out in float16: c must be small enough for any row as long as those seen."""
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


@RTX
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "sm90"}, "--target 'sm90': TensorRT-RTX builds for sm75, sm80, sm86, sm89, sm120, sm121"),
        (
            {"target": "sm86", "bits": "fp8"},
            "on TensorRT-RTX: fp8 needs --target sm89 or later, found sm86; the nearest is w8a8",
        ),
        ({"target": "sm75", "dtype": "bf16"}, "--dtype bf16 needs --target sm80 or later, found sm75"),
        ({"target": "sm80", "attention": "fp8"}, "--attention fp8 needs --target sm89 or later, found sm80"),
        ({"format": "ort", "attention": "fp8"}, "--format ort does not run --attention fp8; trt and trt-rtx do"),
        ({"provider": "cpu"}, "--format trt-rtx does not run --provider cpu; it runs"),
    ],
)
def test_what_no_plan_can_be_is_an_error_before_anything_is_done(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        backend_of(Recipe.parse({"model": "m", "format": "trt-rtx", **options}, "test"))
    assert message in str(caught.value)


@RTX
@pytest.mark.parametrize(("action", "since"), [("fp8", "sm89"), ("w4a16", "sm80")])
def test_a_target_must_have_the_element_types_of_the_rules_not_of_bits(action: str, since: str, tiny: Any) -> None:
    """A recipe's rules decide, where it has them: neither do bits stand for them, nor does a rule that decides nothing."""
    lowest = {"sm89": "sm80", "sm80": "sm75"}[since]
    edges, one = {"match": "emb|norm|proj_out|pos_embed", "action": "float"}, {"match": r"0\.attn1\.to_q", "action": action}
    quantized = {"match": "", "action": "w8a8"}

    def require(*rules: dict[str, Any], target: str = lowest, bits: str = "w8a8") -> None:
        recipe = Recipe.parse({"model": "m", "format": "trt-rtx", "target": target, "bits": bits, "rules": rules}, "test")
        backend = backend_of(recipe)
        assert backend is not None
        backend.require_schemes(rule.scheme for rule in recipe.assign(tiny.linears).values())

    with pytest.raises(RecipeError, match=f"{action} needs --target {since} or later, found {lowest}; the nearest is w.a8"):
        require(edges, one, quantized)
    require(edges, one, quantized, target=since)
    require(edges, {"match": r"0\.attn1", "action": "float"}, one, quantized)
    require(edges, quantized, bits=action)


@RTX
def test_a_rule_that_a_target_does_not_run_is_refused_before_any_work(tiny_folder: Path, tmp_path: Path) -> None:
    rules = [
        {"match": r"0\.attn1\.to_q", "action": "fp8"},
        {"match": "attn1|ff", "action": "bits"},
        {"match": "", "action": "float"},
    ]
    with pytest.raises(RecipeError, match="fp8 needs --target sm89 or later, found sm80; the nearest is w8a8"):
        dq_export.build(model=str(tiny_folder), output_dir=tmp_path / "out", format="trt-rtx", target="sm80,sm120", rules=rules)
    assert not (tmp_path / "out").exists()


def test_bits_that_a_format_does_not_run_are_an_error() -> None:
    with pytest.raises(
        RecipeError,
        match=r"fp8 .* on ONNX Runtime's CPU provider: no CPU kernel takes float8; --format trt has one",
    ):
        backend_of(Recipe.parse({"model": "m", "bits": "fp8"}, "test"))


def test_without_tensorrt_it_says_how_to_go_on(tiny_onnx_per_sample: Path, calibrations: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed here")
    backend = TensorRt("fp16")
    backend.require()
    model = legalised(tiny_onnx_per_sample, calibrations["w8a8"], backend, tmp_path / "model.onnx")
    with pytest.raises(NotHereError, match=r"tensorrt is not installed here; [\s\S]* && dq-export finish "):
        backend.build(model, tmp_path / "engine")


INPUTS: dict[str, Dims] = {"hidden_states": (None, 4, 32, 32), "timestep": (1,), "class_labels": (None,)}


def test_shapes_default_to_batches_of_1_2_and_16() -> None:
    found = profiles(INPUTS, ("", "", ""))
    assert found == {
        "hidden_states": ((1, 4, 32, 32), (2, 4, 32, 32), (16, 4, 32, 32)),
        "class_labels": ((1,), (2,), (16,)),
    }


def test_shapes_in_trtexecs_syntax() -> None:
    given = ("", "hidden_states:8x4x32x32,class_labels:8", "hidden_states:32x4x32x32,class_labels:32")
    assert profiles(INPUTS, given)["hidden_states"] == ((1, 4, 32, 32), (8, 4, 32, 32), (32, 4, 32, 32))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("hidden_states=2", "--opt-shapes 'hidden_states=2': expected name:AxBxC"),
        ("latents:2x4x32x32", "the graph has no input 'latents'; it has hidden_states, timestep, class_labels"),
        ("hidden_states:2x4x64x64", "'hidden_states' is Bx4x32x32, found 2x4x64x64"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(shape: str, message: str) -> None:
    with pytest.raises(BackendError) as caught:
        profiles(INPUTS, ("", shape, ""))
    assert message in str(caught.value)


def test_shapes_must_grow() -> None:
    with pytest.raises(BackendError, match="'class_labels': the shapes must grow"):
        profiles(INPUTS, ("class_labels:4", "class_labels:2", ""))


def test_a_list_of_layers_of_another_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 'Layer 1 is a gemm'"):
        read_layers("Layers:\nLayer 1 is a gemm")


def test_a_gemm_in_parts_is_as_good_as_its_worst() -> None:
    parts = (
        Layer(name="a", kind="gemm", operands=("Int8", "Int8"), nodes=("n",)),
        Layer(name="b", kind="gemm", operands=("Half", "Half"), nodes=("n",)),
        Layer(name="c", kind="kgen", operands=("Half",), nodes=("n",)),
    )
    assert kernel_of(parts, "n") == ("gemm HalfxHalf", "")
    assert kernel_of(parts[:1], "n") == ("gemm Int8xInt8", "Int8")
    assert kernel_of(parts, "other") == ("not found", "")


def test_numpy_is_enough_for_the_graph() -> None:
    assert np.dtype(ir.DataType.FLOAT8E4M3FN.numpy()).itemsize == 1


class Buffer:
    """Answers as polygraphy's runner does, which needs a GPU: every call writes to the same memory."""

    def __init__(self) -> None:
        self.memory = np.zeros(2, dtype=np.float32)

    def infer(self, feed: Any, **options: Any) -> dict[str, Any]:
        from polygraphy.exception import PolygraphyException

        if feed["x"].shape != (2,):
            raise PolygraphyException(f"For input: x, failed to set shape to:\n {feed['x'].shape}")
        self.memory += feed["x"]
        return {"sample": self.memory}


def test_what_a_plan_puts_out_stays_and_inputs_of_other_sizes_are_refused_in_one_line() -> None:
    plan = PlanEngine(engine=None)
    plan.__dict__["_active"] = Buffer()
    first, second = (plan({"x": np.ones(2, dtype=np.float32)}) for _ in range(2))
    assert (first.tolist(), second.tolist()) == ([1, 1], [2, 2])
    with pytest.raises(
        BackendError, match=r"^the plan cannot run on these inputs \(.* to: \(3,\)\); it takes the sizes .* name$"
    ):
        plan({"x": np.ones(3, dtype=np.float32)})
