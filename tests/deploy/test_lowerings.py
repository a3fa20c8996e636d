"""Every cell of the table of lowerings: a real engine whose audit finds the kernels, or a refusal that names the nearest form."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, feed_of, load_graph, recipe_of, run_onnx, sqnr

from dq_export.core.recipe import Recipe, RecipeError, Rule
from dq_export.deploy.backends import backend_of
from dq_export.deploy.lowerings import FLOAT8, INT4_GEMM, LOWERINGS, UNPACKED, Lowering, require_lowerings
from dq_export.deploy.onnxruntime.cpu import ORT, open_graph
from dq_export.deploy.tensorrt.backend import TensorRtRtx
from dq_export.families.reference import Reference
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes, factoring_passes

RTX = TensorRtRtx("fp16", targets=("sm89",))
CELLS = [(row, bits) for row in LOWERINGS for bits in row.bits]
# dB of the output of a network of two blocks, each GEMM's error about that of its codes: 6 dB a bit, from 8 bits' 40 dB on.
LEAST = {"w8a8": 33, "w8a16": 33, "w6a6": 22, "w4a8": 17, "w4a16": 17, "w4a4": 7, "fp8": 22}
README = Path(__file__).parents[2] / "README.md"


def name_of(cell: Any) -> str:
    row, bits = cell
    return f"{bits}-{row.granularity}-{row.weights}"


def recipe_for(row: Lowering, bits: str, reference: Reference, **options: Any) -> Recipe:
    size = 0 if row.weights == "channel" and bits.startswith("w4") else None
    chosen = {} if row.granularity is None else {"granularity": row.granularity}
    return recipe_of(reference, bits=bits, group_size=size, scaling="smooth", bins="per-step", **chosen, **options)


def quantized_graph(calibrated: Any, source: Path, backend: Any, target: Path, *, shared: bool) -> Path:
    graph = load_graph(source)
    run_passes(graph, (*canonical_passes(*calibrated), *backend.legalise(shared=shared, result=calibrated[0])))
    ir.save(graph, target, external_data="model.data", size_threshold_bytes=1024)
    return target


@pytest.fixture(scope="module")
def calibrations(tiny: Reference) -> dict[str, Any]:
    return {name_of(cell): calibrate_tiny(tiny, recipe_for(*cell, tiny)) for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_onnx_runtime_runs_every_form_on_its_kernel(
    cell: Any, tiny: Reference, tiny_onnx: Path, calibrations: Mapping[str, Any], tmp_path: Path
) -> None:
    row, bits = cell
    calibrated = calibrations[name_of(cell)]
    if row.ort.startswith("no: "):
        with pytest.raises(RecipeError, match=re.escape(f" on ort: {row.ort.removeprefix('no: ')}")):
            require_lowerings("ort", calibrated[1].values())
        return
    require_lowerings("ort", calibrated[1].values())
    model = quantized_graph(calibrated, tiny_onnx, ORT, tmp_path / "model.onnx", shared=True)
    audit = ORT.audit(ORT.build(model, tmp_path / "engine"), calibrated[1])
    assert audit.coverage == 1
    kernels = {gemm.kernel for gemm in audit.gemms if gemm.wanted == bits}
    assert kernels == {"MatMulNBits" if row.ort == UNPACKED else "MatMulIntegerToFloat"}
    feed = feed_of(tiny)
    found = open_graph(model)(feed)
    assert sqnr(tiny.forward(feed), found) > LEAST[bits]
    # Inside a kernel that unpacks, inputs are rounded to 8 bits; elsewhere the two run the same codes, and one float32
    # difference in a sum may move a code by one.
    assert sqnr(run_onnx(model, feed), found) > (33 if row.ort == UNPACKED else 40)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_tensorrt_rtx_runs_every_form_on_its_kernel(
    cell: Any, tiny: Reference, tiny_onnx_per_sample: Path, calibrations: Mapping[str, Any], tmp_path: Path
) -> None:
    row, bits = cell
    calibrated = calibrations[name_of(cell)]
    if row.trt.startswith("no: "):
        with pytest.raises(RecipeError, match=re.escape(f" on trt: {row.trt.removeprefix('no: ')}")):
            require_lowerings("trt", calibrated[1].values())
        return
    model = quantized_graph(calibrated, tiny_onnx_per_sample, RTX, tmp_path / "model.onnx", shared=False)
    audit = RTX.audit(RTX.build(model, tmp_path / "engine"), calibrated[1])
    assert audit.coverage == 1
    kernels = {gemm.kernel for gemm in audit.gemms if gemm.wanted == bits}
    expected = {FLOAT8: "FP8xFP8", INT4_GEMM: "Int4"}.get(row.trt, "Int8xInt8")
    assert all(expected in kernel for kernel in kernels), kernels
    feed = feed_of(tiny, [500, 500, 500])
    assert sqnr(tiny.forward(feed), run_onnx(model, feed)) > LEAST[bits]


def test_codes_keep_to_their_bits(tiny: Reference, tiny_onnx: Path, calibrations: Mapping[str, Any]) -> None:
    """What the graph's own codes are, on inputs far beyond the calibrated range."""
    for bits, qmax in (("w6a6", 31), ("w4a4", 7)):
        calibrated = next(calibrations[name_of(cell)] for cell in CELLS if cell[1] == bits and cell[0].granularity == "tensor")
        graph = load_graph(tiny_onnx)
        run_passes(graph, (*canonical_passes(*calibrated), *factoring_passes(calibrated[0])))
        codes = [node.outputs[0] for node in graph.graph if node.op_type == "QuantizeLinear"]
        graph.graph.outputs[:] = codes
        feed = feed_of(tiny)
        feed["hidden_states"] = feed["hidden_states"] * 100
        found = np.concatenate([np.ravel(value) for value in run_all(graph, feed)])
        assert found.dtype == np.int8
        assert np.abs(found).max() == qmax  # reached, and not passed


def run_all(model: ir.Model, feed: Mapping[str, Any]) -> list[Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    text = ir.serde.serialize_model(model).SerializeToString()
    found: list[Any] = ort.InferenceSession(text, options, providers=["CPUExecutionProvider"]).run(None, dict(feed))
    return found


def test_a_token_of_zeros_stays_finite(tiny: Reference, tiny_onnx: Path, calibrations: Mapping[str, Any]) -> None:
    cell = next(cell for cell in CELLS if cell[0].granularity == "token" and cell[1] == "w8a8")
    graph = load_graph(tiny_onnx)
    run_passes(graph, canonical_passes(*calibrations[name_of(cell)]))
    feed = feed_of(tiny)
    feed["hidden_states"] = feed["hidden_states"] * 0
    assert sqnr(tiny.forward(feed), run_onnx(graph, feed)) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w4a8", "granularity": "token-group", "group_size": 48}, "its kernel unpacks blocks of 128, 64, 32, 16"),
        ({"bits": "fp8"}, "fp8 granularity tensor on ort: no CPU kernel for float8; w8a8, or --format trt"),
        ({"bits": "w8a16", "format": "trt-rtx"}, "w8a16 on trt: int8 blocks are unpacked by a kernel of their own; w4a16"),
        ({"bits": "w4a8", "granularity": "token-group", "format": "trt"}, "granularity token"),
        ({"bits": "w4a8", "provider": "openvino"}, "only --bits w8a8 with granularity tensor"),
    ],
)  # fmt: skip
def test_a_form_that_a_backend_refuses_names_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        backend_of(Recipe.parse({"model": "tiny", **options}, "test"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w8a8", "group_size": 16}, "an 8-bit integer GEMM has one weight scale an output channel; use group_size 0"),
        ({"bits": "w4a16", "group_size": 0}, "only blocks are unpacked inside a GEMM; use group_size 128"),
        ({"bits": "w6a6", "granularity": "token-group"}, "round each token's groups to 8 bits; use w4a8, w8a8 or token"),
        ({"bits": "w4a8", "granularity": "token-group", "group_size": 0}, "give the groups a size, or use granularity token"),
    ],
)
def test_a_form_that_contradicts_itself_is_refused_by_the_recipe(options: dict[str, Any], message: str, tiny: Reference) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tiny, **options).assign(tiny.linears)


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
    assert sqnr(tiny.forward(feed), open_graph(model)(feed)) > LEAST["w4a8"]


def test_the_readme_shows_the_table() -> None:
    rows = [
        "| bits | activation scale | weight scale | ONNX Runtime, CPU | OpenVINO | TensorRT, TensorRT-RTX |",
        "|---|---|---|---|---|---|",
    ]
    for row in LOWERINGS:
        cells = [", ".join(row.bits), row.granularity or "float", row.weights, row.ort, row.openvino, row.trt]
        rows.append(f"| {' | '.join(cells)} |")
    assert "\n".join(rows) in README.read_text(encoding="utf-8"), "\n".join(rows)
