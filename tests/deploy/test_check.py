"""The static checker against the real TensorRT-RTX builder, and what only it can know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from checker import FORMS, Form, real_verdict, simple, static_verdict
from conftest import load_graph

from dq_export.deploy.check import check
from dq_export.deploy.ort import ORT
from dq_export.passes.base import run_passes
from dq_export.passes.factor_scale import FactorScale
from dq_export.passes.pipeline import canonical_passes

RTX = pytest.mark.skipif(__import__("importlib.util").util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")


@RTX
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_its_verdict_is_the_builders(form: Form, tmp_path: Path) -> None:
    said, rule = static_verdict(form)
    real, words = real_verdict(form, tmp_path)
    if form.trap:  # the builder takes it and computes other numbers than ONNX says
        assert (said, real) == ("rejected", "low precision")
    else:
        assert said == real, f"{rule}; {words}"
    assert (said == "low precision") == (not rule)


def test_a_scale_from_a_table_is_forbidden_for_tensorrt_and_float_for_rtx() -> None:
    form = next(form for form in FORMS if form.name == "scale from a table, direct")
    verdicts = {target: check(form.make(), target)[0].verdict for target in ("trt", "trt-rtx")}
    assert verdicts == {"trt": "rejected", "trt-rtx": "float"}


@pytest.mark.parametrize(("name", "target"), [("fp8, one scale", "sm86"), ("int4 blocks of 64, weight only", "sm75")])
def test_a_type_that_the_oldest_target_lacks_is_rejected(name: str, target: str) -> None:
    form = next(form for form in FORMS if form.name == name)
    (finding,) = check(form.make(), "trt-rtx", (target, "sm120"))
    assert finding.verdict == "rejected"
    assert target in finding.rule


def test_a_graph_without_quantized_gemms_has_no_findings(tiny_onnx: Path) -> None:
    assert check(load_graph(tiny_onnx), "trt") == []


def test_our_own_graphs_are_as_the_audits_say(tiny_onnx: Path, tiny_calibrated: Any) -> None:
    wanted = {name for name, rule in tiny_calibrated[1].items() if rule.action == "w8a8"}
    for target, passes in (("trt", [FactorScale()]), ("ort", ORT.legalise(shared=True, result=tiny_calibrated[0]))):
        graph = load_graph(tiny_onnx)
        run_passes(graph, (*canonical_passes(*tiny_calibrated), *passes))
        findings = check(graph, target)  # type: ignore[arg-type]
        low = {finding.node for finding in findings if finding.verdict == "low precision"}
        modulation = {finding.node for finding in findings if finding.weight_only}
        assert low - modulation == wanted
        assert not any(finding.failed for finding in findings)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        ("no zero point", "the DequantizeLinear of its activation has no zero point"),
        ("shared int8", "an int8 activation that several GEMMs read"),
    ],
)
def test_rules_of_onnx_runtime(spoil: str, rule: str, tiny_onnx: Path, tiny_calibrated: Any) -> None:
    graph = load_graph(tiny_onnx)
    run_passes(graph, canonical_passes(*tiny_calibrated))  # int8 codes
    if spoil == "no zero point":
        for node in [node for node in graph.graph if node.op_type == "DequantizeLinear" and "activation" in str(node.name)]:
            node.resize_inputs(2)
    found = [finding for finding in check(graph, "ort") if finding.rule == rule]
    assert len(found) == (12 if spoil == "no zero point" else 6)
    assert all(finding.failed and finding.fix for finding in found)


def test_every_finding_that_is_not_low_precision_says_what_to_do() -> None:
    for form in FORMS:
        for finding in check(form.make(), "trt-rtx", ("sm89",)):
            assert bool(finding.rule) == bool(finding.fix) == (finding.verdict != "low precision")


def test_it_reads_no_weight() -> None:
    model = simple()()
    codes = next(value for value in model.graph.initializers.values() if tuple(value.shape or ()) == (128, 128))

    def refuse() -> Any:
        raise AssertionError("read")

    codes.const_value = ir.LazyTensor(refuse, ir.DataType.INT8, ir.Shape([128, 128]), name=codes.name)
    assert check(model, "trt-rtx")[0].verdict == "low precision"
