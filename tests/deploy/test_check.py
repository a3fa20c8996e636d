"""The static checker: one case a rule, against the runtimes themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from checker import OTHER_NUMBERS, REAL, compare
from conftest import load_graph
from forms import FORMS, Form, Sketch
from forms.sketch import F16, F32, INT8, K, N

from dq_export.deploy.check import CanonicalError, Finding, check
from dq_export.deploy.onnxruntime.cpu import ORT, version
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes, factoring_passes

RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
RULES_OF = (1, 31)
"""The version of ONNX Runtime whose kernels the rules for `ort` describe."""
BUILT = (
    "int8, a scale an output channel", "fp8, one scale", "int4 blocks of 64 of 256", "uint8 codes, zero point 0",
    "scale from a table, direct", "one GEMM for q, k and v, a scale a channel", "Gemm, int32 bias",
    "Conv, int8, result quantized", "Conv, int8, scale from a table", "Einsum, int8", "in a branch", "in a loop", "in a function",
    "in a function, called twice",
    "int4 blocks that two GEMMs read", "codes turned before the DQ", "a GEMM, and at an Add uint8 of zero point 128",
    "QLinearMatMul, uint8 x int8", "activation in blocks", "ConvTranspose, one scale", "nodes without names",
)  # fmt: skip
"""What the suite builds with TensorRT-RTX; `python benchmarks/checker.py` builds all."""


@pytest.fixture
def judged_runtime() -> None:
    """Skip under an older ONNX Runtime than that of the rules: it has other kernels."""
    if version() < RULES_OF:
        pytest.skip(f"the rules for ort are those of ONNX Runtime {'.'.join(map(str, RULES_OF))}")


def form(name: str) -> Form:
    return next(item for item in FORMS if item.name == name)


@pytest.mark.usefixtures("judged_runtime")
@pytest.mark.parametrize("item", [item for item in FORMS if item.only != "trt-rtx"], ids=lambda item: item.name)
def test_its_verdict_is_onnx_runtimes(item: Form, tmp_path: Path) -> None:
    judged, real, wrong = compare(item, "ort", tmp_path)
    assert not wrong, f"{judged}, {real}: {wrong}"


@RTX
@pytest.mark.parametrize("name", BUILT)
def test_its_verdict_is_the_rtx_builders(name: str, tmp_path: Path) -> None:
    judged, real, wrong = compare(form(name), "trt-rtx", tmp_path)
    assert not wrong, f"{judged}, {real}: {wrong}"


def test_both_tables_are_long_and_have_different_names() -> None:
    assert len({item.name for item in FORMS}) == len(FORMS)
    for target in REAL:
        assert len([item for item in FORMS if item.only in ("", target)]) >= 60


@pytest.mark.usefixtures("judged_runtime")
def test_other_numbers_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "form.onnx"
    ir.save(form("weight scale along the input").model("ort"), path)
    verdict, words = REAL["ort"](path)
    assert (verdict, words.split(":")[0]) == ("rejected", "other numbers")
    assert float(words.split()[2]) > 3 * OTHER_NUMBERS


def test_a_scale_from_a_table_is_forbidden_for_tensorrt_and_float_for_rtx() -> None:
    graph = form("scale from a table, direct").model("trt-rtx")
    assert {target: check(graph, target)[0].verdict for target in ("trt", "trt-rtx")} == {"trt": "rejected", "trt-rtx": "float"}  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "target"), [("fp8, one scale", "sm86"), ("int4 blocks of 64 of 256", "sm75")])
def test_a_type_that_the_oldest_target_lacks_is_rejected(name: str, target: str) -> None:
    (finding,) = check(form(name).model("trt-rtx"), "trt-rtx", (target, "sm120"))
    assert finding.verdict == "rejected"
    assert target in finding.rule


def test_float8_beside_a_gemm_is_rejected_for_an_old_target() -> None:
    findings = check(form("a GEMM, and at an Add fp8").model("trt-rtx"), "trt-rtx", ("sm86",))
    assert [(item.verdict, item.gemm) for item in findings if item.failed] == [("rejected", False)]


@pytest.mark.parametrize("target", ["trt", "trt-rtx", "ort", "ort-cuda"])
def test_every_verdict_has_a_reason_and_a_remedy_unless_it_is_low_precision(target: Any) -> None:
    for item in FORMS:
        for finding in check(item.model("ort" if target.startswith("ort") else "trt-rtx"), target, ("sm89",)):
            assert bool(finding.rule) == bool(finding.fix) == (finding.verdict != "low precision"), (item.name, finding)


@pytest.mark.parametrize("target", ["trt", "trt-rtx", "ort", "ort-cuda"])
def test_every_quantized_form_has_a_finding(target: Any) -> None:
    for item in FORMS:
        assert check(item.model("ort" if target.startswith("ort") else "trt-rtx"), target), item.name


@pytest.mark.parametrize(
    ("name", "verdict", "remedy"),
    [
        ("int8, a scale an output channel", "float", "onnxruntime-ep-nv-tensorrt-rtx"),
        ("QLinearMatMul, uint8 x int8", "float", "TensorRT provider"),
        ("DynamicQuantizeLinear and MatMulInteger", "float", "MatMulNBits"),
        ("MatMulInteger", "low precision", ""),
        ("int4 blocks of 64 of 256", "low precision", ""),
        ("MatMulNBits", "low precision", ""),
        ("int4 blocks along axis -2", "float", "along axis 0"),
        ("int8 blocks of 8 of 256", "rejected", "blocks of int4"),
        ("int8 in 2 blocks under int8 activations", "rejected", "blocks of int4"),
        ("float8_e4m3fn blocks of 64 of 256", "rejected", "blocks of int4"),
        ("int16 blocks of 64 of 256", "float", "along axis 0"),
        ("int4 blocks along two axes", "rejected", "only the axis of the blocks"),
        ("127 scales for 128 channels", "rejected", "one scale for each index"),
        ("weight scale of another float type", "rejected", "one float type"),
        ("Flatten behind DQ, int8, opset 21", "low precision", ""),
        ("QLinearMatMul, int8 x uint8", "rejected", "int8 for both"),
        ("QAttention", "float", "TensorRT provider"),
    ],
)
def test_the_cuda_provider_has_no_integer_gemm(name: str, verdict: str, remedy: str) -> None:
    findings = check(form(name).model("ort"), "ort-cuda")
    finding = next(item for item in findings if item.node == "gemm")
    assert finding.verdict == verdict
    assert remedy in finding.fix
    assert finding.failed == (verdict == "rejected" or (verdict == "float" and not finding.weight_only))


def test_an_operator_that_no_rule_knows_is_reported() -> None:
    sketch = Sketch(F32, ("batch", 16, K), 21)
    graph = sketch.model(sketch.op("QLinearTopK", sketch.x, name="new", domain="com.microsoft"))
    assert [(item.node, item.verdict, item.failed) for item in check(graph, "ort")] == [("new", "unknown", True)]


@pytest.mark.parametrize("operator", ["QLinearAdd", "QLinearConcat", "QGemm", "MatMulNBits", "MatMulInteger", "QAttention"])
def test_operators_on_codes_are_judged_for_every_target(operator: str) -> None:
    sketch = Sketch(F32, ("batch", 16, K), 21)
    graph = sketch.model(sketch.op(operator, sketch.x, name="it", domain="com.microsoft"))
    assert {target: check(graph, target)[0].verdict for target in ("trt", "trt-rtx", "ort")} == {  # type: ignore[arg-type]
        "trt": "rejected", "trt-rtx": "rejected", "ort": "low precision",
    }  # fmt: skip


def test_operators_that_multiply_on_floats_behind_a_dequantizelinear_fail() -> None:
    sketch = Sketch(F32, ("batch", 16, K), 21)
    left, right = sketch.activation(sketch.x), sketch.weight(axis=1)
    graph = sketch.model(sketch.op("FusedMatMul", left, right, name="it", domain="com.microsoft"))
    assert [(item.verdict, item.failed) for item in check(graph, "ort")] == [("float", True)]


def test_the_fix_of_an_int32_bias_is_onnxruntimes_own_option() -> None:
    (finding,) = check(form("Gemm, int32 bias").model("trt-rtx"), "trt")
    assert finding.verdict == "rejected"
    assert "QuantizeBias" in finding.fix


def test_a_graph_without_quantized_gemms_has_no_findings(tiny_onnx: Path) -> None:
    for target in ("trt", "ort"):
        assert check(load_graph(tiny_onnx), target) == []  # type: ignore[arg-type]


def test_our_own_graphs_are_as_the_audits_say(tiny_onnx: Path, tiny_calibrated: Any) -> None:
    quantized = {name for name, rule in tiny_calibrated[1].items() if rule.action == "w8a8"}
    result = tiny_calibrated[0]
    for target, passes in (("trt", factoring_passes(result)), ("ort", ORT.legalise(shared=True, result=result))):
        graph = load_graph(tiny_onnx)
        run_passes(graph, (*canonical_passes(*tiny_calibrated), *passes))
        findings = check(graph, target)  # type: ignore[arg-type]
        low = {finding.node for finding in findings if finding.verdict == "low precision"}
        modulation = {finding.node for finding in findings if finding.weight_only}
        assert low - modulation == quantized
        assert not any(finding.failed for finding in findings)


@pytest.mark.parametrize(
    ("spoil", "rule", "count"),
    [
        ("no zero point", "the int8 QuantizeLinear of its activation has no zero point", 6),
        ("shared int8", "an int8 activation that several operators read", 6),
    ],
)
def test_rules_of_onnx_runtime(spoil: str, rule: str, count: int, tiny_onnx: Path, tiny_calibrated: Any) -> None:
    graph = load_graph(tiny_onnx)
    run_passes(graph, canonical_passes(*tiny_calibrated))  # int8 codes
    if spoil == "no zero point":
        for node in [node for node in graph.graph if node.op_type == "QuantizeLinear"]:
            node.resize_inputs(2)
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.INT8.value)
    findings = [finding for finding in check(graph, "ort") if finding.rule == rule]
    assert len(findings) == count
    assert all(finding.failed and finding.fix for finding in findings)


def test_it_changes_nothing_and_reads_no_weight() -> None:
    model = form("int8, a scale an output channel").model("trt-rtx")
    codes = next(value for value in model.graph.initializers.values() if tuple(value.shape or ()) == (K, N))

    def refuse() -> Any:
        raise AssertionError("read")

    codes.const_value = ir.LazyTensor(refuse, ir.DataType.INT8, ir.Shape([K, N]), name=codes.name)
    before = [(node.name, node.op_type, [value.name for value in node.inputs if value]) for node in model.graph]
    for target in ("trt-rtx", "ort"):
        assert check(model, target)[0].verdict == ("float" if target == "ort" else "low precision")  # type: ignore[arg-type]
    assert [(node.name, node.op_type, [value.name for value in node.inputs if value]) for node in model.graph] == before


def test_nodes_in_a_circle_are_refused() -> None:
    sketch = Sketch(F16, ("batch", 16, K), 21)
    first = sketch.op("Identity", sketch.x, name="first")
    second = sketch.op("Identity", first, name="second")
    sketch.nodes[0].replace_input_with(0, second)
    with pytest.raises(CanonicalError, match="circle"):
        check(sketch.model(second), "trt")


def test_arithmetic_on_constants_is_bounded() -> None:
    sketch = Sketch(F32, ("batch", 16, K), 21)
    value = sketch.float([[0.5] * 1024] * 512)
    for _ in range(200):
        value = sketch.op("Mul", value, value)
    huge = sketch.op("Add", sketch.op("Unsqueeze", value, sketch.constant([2])), sketch.float([[0.0] * 4096]))
    y = sketch.op("Add", sketch.plain(kind=INT8), sketch.op("ReduceMax", huge, keepdims=0))
    assert [item.verdict for item in check(sketch.model(y), "ort")] == ["low precision"]


def test_a_failed_finding_is_one_to_look_at() -> None:
    kinds = {
        ("rejected", True, False): True, ("rejected", False, False): True, ("unknown", False, False): True,
        ("float", True, False): True, ("float", True, True): False, ("float", False, False): False,
        ("low precision", True, False): False,
    }  # fmt: skip
    for (verdict, gemm, alone), failed in kinds.items():
        assert Finding(node="n", verdict=verdict, gemm=gemm, weight_only=alone).failed == failed  # type: ignore[arg-type]
