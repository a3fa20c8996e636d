"""Every cell of the table of lowerings: a real engine whose audit finds the kernels, or a refusal that names the nearest form."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, feed_of, load_graph, recipe_of, run_onnx, sqnr

from dq_export.core.qtypes import INT4
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.rule import Rule
from dq_export.core.scheme import PRESETS, Scheme, TensorScheme, all_schemes, scheme_of
from dq_export.deploy.backend import Backend
from dq_export.deploy.backends import BACKENDS, backend_of
from dq_export.deploy.check.ort_unpacking import BYTES_SINCE
from dq_export.deploy.lowerings import Lowering
from dq_export.deploy.onnxruntime.cpu import ORT, open_graph, version
from dq_export.deploy.support_table import support_table
from dq_export.deploy.tensorrt.backend import TensorRtRtx
from dq_export.families.reference import Reference
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes, factoring_passes

RTX = TensorRtRtx("fp16", targets=("sm89",))
SCHEMES = tuple(all_schemes())
# dB of the output of a network of two blocks, each GEMM's error about that of its codes: 6 dB a bit, from 8 bits' 40 dB on.
MINIMUM = {"w8a8": 33, "w8a16": 33, "w6a6": 22, "w4a8": 17, "w4a16": 17, "w4a4": 7, "fp8": 22}
SOMETHING_ELSE = (PRESETS["float"], PRESETS["weight-only"])
Calibrate = Callable[[Scheme], Any]
PAGE = Path(__file__).parents[2] / "docs" / "bits.md"


def recipe_for(scheme: Scheme, reference: Reference) -> Recipe:
    """The recipe whose quantized linears have a scheme."""
    size = 0 if scheme.weight == TensorScheme(qtype=INT4, granularity="channel") else None
    chosen = {} if scheme.activation is None else {"granularity": scheme.activation.granularity}
    return recipe_of(reference, bits=scheme.name, group_size=size, scaling="smooth", bins="per-step", **chosen)


def quantized_graph(calibrated: Any, source: Path, backend: Any, target: Path, *, shared: bool) -> Path:
    graph = load_graph(source)
    run_passes(graph, (*canonical_passes(*calibrated), *backend.legalise(shared=shared, result=calibrated[0])))
    ir.save(graph, target, external_data="model.data", size_threshold_bytes=1024)
    return target


@pytest.fixture(scope="module")
def calibrate_as(tiny: Reference) -> Calibrate:
    return cache(lambda scheme: calibrate_tiny(tiny, recipe_for(scheme, tiny)))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: f"{backend.title}-{backend.dtype}")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_refusal_names_a_scheme_that_the_backend_runs(scheme: Scheme, backend: Backend) -> None:
    answer = backend.supports(scheme)
    if isinstance(answer, Lowering):
        backend.require_schemes([scheme, scheme.fitted(1152), *SOMETHING_ELSE])
        return
    assert isinstance(backend.supports(answer.nearest), Lowering)
    with pytest.raises(RecipeError, match=re.escape(f"{scheme} on {backend.title}: {answer.reason}; the nearest is ")) as error:
        backend.require_schemes([scheme, answer.nearest, scheme.fitted(1152)])
    assert len(str(error.value).splitlines()) == 1  # one line a reason, whatever the widths


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if isinstance(ORT.supports(s), Lowering)], ids=str)
def test_onnx_runtime_runs_every_form_on_its_kernel(
    scheme: Scheme, tiny: Reference, tiny_onnx: Path, calibrate_as: Calibrate, tmp_path: Path
) -> None:
    calibrated, lowering = calibrate_as(scheme), ORT.supports(scheme)
    assert isinstance(lowering, Lowering)
    ORT.require_schemes(rule.scheme for rule in calibrated[1].values())
    model = quantized_graph(calibrated, tiny_onnx, ORT, tmp_path / "model.onnx", shared=True)
    audit = ORT.audit(ORT.build(model, tmp_path / "engine"), calibrated[1])
    assert audit.coverage == 1
    assert {gemm.kernel for gemm in audit.gemms if gemm.wanted == scheme.name} == {lowering.kernel}
    feed = feed_of(tiny)
    actual = open_graph(model)(feed)
    assert sqnr(tiny.forward(feed), actual) > MINIMUM[scheme.name]
    # Inside a kernel that unpacks, inputs are rounded to 8 bits; elsewhere the two run the same codes, and one float32
    # difference in a sum may move a code by one.
    assert sqnr(run_onnx(model, feed), actual) > (33 if scheme.graph_type is None else 40)


def rtx_cells() -> list[Any]:
    """Every scheme that TensorRT-RTX runs; those of a kernel that an earlier one shows are slow."""
    cells: list[Any] = []
    kernels: set[object] = set()
    for scheme in SCHEMES:
        lowering = RTX.supports(scheme)
        if isinstance(lowering, Lowering):
            kind = (lowering.kernel, scheme.per_token, scheme.two_level)
            cells.append(pytest.param(scheme, marks=pytest.mark.slow) if kind in kernels else scheme)
            kernels.add(kind)
    return cells


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
@pytest.mark.parametrize("scheme", rtx_cells(), ids=str)
def test_tensorrt_rtx_runs_every_form_on_its_kernel(
    scheme: Scheme, tiny: Reference, tiny_onnx_per_sample: Path, calibrate_as: Calibrate, tmp_path: Path
) -> None:
    calibrated, lowering = calibrate_as(scheme), RTX.supports(scheme)
    assert isinstance(lowering, Lowering)
    model = quantized_graph(calibrated, tiny_onnx_per_sample, RTX, tmp_path / "model.onnx", shared=False)
    audit = RTX.audit(RTX.build(model, tmp_path / "engine"), calibrated[1])
    assert audit.coverage == 1
    kernels = {gemm.kernel for gemm in audit.gemms if gemm.wanted == scheme.name}
    assert all(lowering.kernel in kernel for kernel in kernels), kernels
    feed = feed_of(tiny, [500, 500, 500])
    assert sqnr(tiny.forward(feed), run_onnx(model, feed)) > MINIMUM[scheme.name]


def test_codes_keep_to_their_bits(tiny: Reference, tiny_onnx: Path, calibrate_as: Calibrate) -> None:
    """What the graph's own codes are, on inputs far beyond the calibrated range."""
    for bits, qmax in (("w6a6", 31), ("w4a4", 7)):
        calibrated = calibrate_as(PRESETS[bits])
        graph = load_graph(tiny_onnx)
        run_passes(graph, (*canonical_passes(*calibrated), *factoring_passes(calibrated[0])))
        codes = [node.outputs[0] for node in graph.graph if node.op_type == "QuantizeLinear"]
        graph.graph.outputs[:] = codes
        feed = feed_of(tiny)
        feed["hidden_states"] = feed["hidden_states"] * 100
        actual = np.concatenate([np.ravel(value) for value in run_all(graph, feed)])
        assert actual.dtype == np.int8
        assert np.abs(actual).max() == qmax  # reached, and not passed


def run_all(model: ir.Model, feed: Mapping[str, Any]) -> list[Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    text = ir.serde.serialize_model(model).SerializeToString()
    actual: list[Any] = ort.InferenceSession(text, options, providers=["CPUExecutionProvider"]).run(None, dict(feed))
    return actual


def test_a_token_of_zeros_stays_finite(tiny: Reference, tiny_onnx: Path, calibrate_as: Calibrate) -> None:
    graph = load_graph(tiny_onnx)
    run_passes(graph, canonical_passes(*calibrate_as(scheme_of("w8a8", "token"))))
    feed = feed_of(tiny)
    feed["hidden_states"] = feed["hidden_states"] * 0
    assert sqnr(tiny.forward(feed), run_onnx(graph, feed)) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w4a8", "granularity": "token-group", "group_size": 48}, "16; the nearest is .* token-group group_size 16"),
        ({"bits": "fp8"}, "no CPU kernel takes float8; --format trt has one; the nearest is w8a8 granularity tensor"),
        ({"bits": "w8a16", "format": "trt-rtx"}, "w8a16 on TensorRT-RTX: int8 blocks .*; the nearest is w4a16"),
        ({"bits": "w4a8", "granularity": "token-group", "format": "trt"}, "one scale per token; the nearest is w4a8 .* token"),
        ({"bits": "w4a8", "provider": "openvino"}, "not measured there; the nearest is w8a8 granularity tensor"),
    ],
)  # fmt: skip
def test_a_form_that_a_backend_refuses_names_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        backend_of(Recipe.parse({"model": "tiny", **options}, "test"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w8a8", "group_size": 16}, "an 8-bit integer GEMM has one weight scale per output channel; use group_size 0"),
        ({"bits": "w4a16", "group_size": 0}, "only blocks are unpacked inside a GEMM; use group_size 128"),
        ({"bits": "w6a6", "granularity": "token-group"}, "round each token's groups to 8 bits; use w4a8, w8a8 or token"),
        ({"bits": "w4a8", "granularity": "token-group", "group_size": 0}, "give the groups a size, or use granularity token"),
    ],
)
def test_a_form_that_contradicts_itself_is_refused_by_the_recipe(options: dict[str, Any], message: str, tiny: Reference) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tiny, **options).assign(tiny.linears)
    with pytest.raises(RecipeError, match=message):  # before the model is known
        backend_of(Recipe.parse({"model": "tiny", **options}, "test"))


def test_rules_mix_bits_and_granularities(tiny: Reference, tiny_onnx: Path, tmp_path: Path) -> None:
    rules = (
        Rule(match=r"blocks\.0\.attn1", action="w8a8", granularity="token"),
        Rule(match=r"blocks\.0\.ff", action="w4a8", group_size=32),
        Rule(match=r"blocks\.1\.attn1", action="w4a16"),
        Rule(match=r"blocks\.1\.ff", action="w6a6"),
        *tiny.rules[1:],
    )
    calibrated = calibrate_tiny(tiny, recipe_of(tiny, rules=rules))
    model = quantized_graph(calibrated, tiny_onnx, ORT, tmp_path / "model.onnx", shared=True)
    audit = ORT.audit(ORT.build(model, tmp_path / "engine"), calibrated[1])
    assert audit.coverage == 1
    assert {gemm.wanted for gemm in audit.gemms if gemm.integer} == {"w8a8", "w4a8", "w4a16", "w6a6"}
    feed = feed_of(tiny)
    assert sqnr(tiny.forward(feed), open_graph(model)(feed)) > MINIMUM["w4a8"]


@pytest.mark.parametrize(
    ("options", "nearest"),
    [({"bits": "w8a16"}, "w4a16"), ({"bits": "w8a8", "granularity": "token-group"}, "w8a8 granularity tensor")],
)
def test_blocks_of_8_bits_are_refused_before_1_25(options: dict[str, Any], nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    message = "before version 1.25, ONNX Runtime multiplies blocks of 8 bits in float; 1.24.4 is installed; the nearest is"
    with pytest.raises(RecipeError, match=f"{re.escape(f'{message} {nearest}')}$"):
        backend_of(Recipe.parse({"model": "tiny", **options}, "test"))
    assert backend_of(Recipe.parse({"model": "tiny", **options, "bits": options["bits"].replace("w8", "w4")}, "test")) == ORT
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.0")
    assert backend_of(Recipe.parse({"model": "tiny", **options}, "test")) == ORT


@pytest.mark.skipif(version() < BYTES_SINCE, reason="the table is that of a later ONNX Runtime")
def test_the_page_about_bits_shows_the_table() -> None:
    assert support_table() in PAGE.read_text(encoding="utf-8"), support_table()
