"""The verdict: what fails, what it says, and what it advises."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dq_export.core.recipe import Recipe
from dq_export.deploy.audit import Audit, AuditError, Gemm
from dq_export.deploy.backend import NotHereError
from dq_export.deploy.parity import CallParity, Parity, ParityError
from dq_export.report.report import EncoderReport, Report
from dq_export.report.verdict import concluded, judge, require


def call(stage: str, sqnr: float, timestep: float = 1) -> CallParity:
    return CallParity(stage=stage, timestep=timestep, bin=0, sqnr=sqnr, cosine=1, max_error=0)


def report(*calls: CallParity, integer: bool = True) -> Report:
    gemm = Gemm(
        name="blocks.0.to_q", flops=8, wanted="w8a8", required=True, kernel="MatMul", integer=integer, reason="no zero point"
    )
    other = Gemm(name="attention", flops=8, wanted="none", required=False, kernel="MatMul", integer=False, reason="")
    audit = Audit.of([gemm, other])
    return Report(
        model="m", digest="0" * 64, sampler="s", guidance_scale=1, timesteps="shared", machine="", versions={}, seconds={},
        linears=[], passes=[], audit=audit, parity=Parity(calls=calls, trajectories=()),
    )  # fmt: skip


def test_a_comparison_without_a_call_is_in_no_report() -> None:
    written = report(call("engine", 30)).model_dump(mode="json")
    assert Report.model_validate(written).ran()
    written["parity"]["calls"] = []
    with pytest.raises(ValidationError, match="at least 1 item"):
        Report.model_validate(written)


def recipe(**values: Any) -> Recipe:
    return Recipe.parse({"model": "m", **values}, "test")


def test_an_export_that_keeps_everything_passes_and_names_its_worst_call() -> None:
    verdict = judge(report(call("float-onnx", 90), call("qdq-onnx", 30, 4), call("engine", 25, 7), call("engine", 40)), recipe())
    assert verdict is not None
    assert (verdict.outcome, verdict.status, verdict.reasons, verdict.advice) == ("passed", 0, [], "")
    assert verdict.worst == call("engine", 25, 7)
    assert (verdict.min_sqnr, verdict.coverage, verdict.min_coverage) == (20, 1, 0.95)
    require(verdict)


def test_the_earliest_bad_stage_is_blamed() -> None:
    low = report(call("float-onnx", 30), call("engine", 50, 2), call("engine", 10, 7))
    verdict = judge(low, recipe())
    assert verdict is not None
    assert (verdict.outcome, verdict.status) == ("failed", 4)
    assert verdict.reasons == [
        "float-onnx: 30.0 dB at timestep 1, required 80.0 dB",
        "engine: 10.0 dB at timestep 7, required 20.0 dB",
    ]
    assert "no option of quantization helps" in verdict.advice
    with pytest.raises(ParityError, match=r"float-onnx: 30.0 dB(?s:.*)engine: 10.0 dB(?s:.*)no option of quantization helps"):
        require(verdict)


@pytest.mark.parametrize(
    ("values", "advised", "not_advised"),
    [
        ({}, ["--granularity token", "--rounding gptq", "--bins per-step"], ["--scaling", "--bits"]),
        ({"scaling": "none", "bits": "w4a8"}, ["--granularity token", "--rounding gptq", "--scaling auto", "--bits w8a8"], []),
        (
            {"granularity": "token", "rounding": "gptq"},
            ["--rounding distill"],
            ["--granularity", "--rounding gptq", "--bins", "--scaling"],
        ),
        ({"granularity": "token", "rounding": "distill"}, [], ["--granularity", "--rounding", "--bins", "--scaling"]),
        ({"bits": "fp8", "format": "trt"}, ["--bins per-step"], ["--granularity", "--rounding"]),
        ({"bits": "w4a16"}, ["--rounding gptq"], ["--granularity", "--bins"]),
        ({"provider": "openvino"}, ["--rounding gptq"], ["--granularity"]),
    ],
)
def test_only_what_the_recipe_has_not_used_and_can_use_is_advised(
    values: dict[str, Any], advised: list[str], not_advised: list[str]
) -> None:
    verdict = judge(report(call("engine", 10)), recipe(**values))
    assert verdict is not None
    for option in [*advised, "--exclude", "--min-sqnr"]:
        assert option in verdict.advice
    for option in not_advised:
        assert option not in verdict.advice


def test_an_engine_in_float_is_named_before_its_distance() -> None:
    verdict = judge(report(call("engine", 10), integer=False), recipe())
    assert verdict is not None
    assert (verdict.outcome, verdict.status, verdict.coverage) == ("failed", 3, 0)
    assert verdict.reasons[0] == (
        "0.0% of the quantized GEMMs' FLOPs run on low-precision kernels, the recipe requires 95.0%. In float:"
    )
    assert verdict.reasons[1:] == [
        "  blocks.0.to_q: MatMul; no zero point",
        "engine: 10.0 dB at timestep 1, required 20.0 dB",
    ]
    with pytest.raises(AuditError, match=r"blocks\.0\.to_q: MatMul; no zero point"):
        require(verdict)


def test_an_engine_for_another_machine_is_unfinished_unless_something_failed() -> None:
    good, bad = report(call("qdq-onnx", 50)), report(call("qdq-onnx", 5))
    verdict = judge(good.model_copy(update={"audit": None}), recipe(), "tensorrt is not installed here")
    assert verdict is not None
    assert (verdict.outcome, verdict.status, verdict.coverage) == ("unfinished", 5, None)
    with pytest.raises(NotHereError, match="tensorrt is not installed here"):
        require(verdict)
    failed = judge(bad, recipe(), "tensorrt is not installed here")
    assert failed is not None
    assert (failed.outcome, failed.status) == ("failed", 4)


def test_a_text_encoder_that_is_too_far_from_pytorchs_fails_the_export() -> None:
    sizes = {"float_bytes": 4_000_000, "stored_bytes": 1_100_000}
    good = report(call("engine", 30)).model_copy(update={"text_encoder": EncoderReport(sqnr=21, prompt="a seven", **sizes)})
    verdict = judge(good, recipe())
    assert verdict is not None
    assert verdict.status == 0
    for prompt, words in (("a seven", "the prompt 'a seven'"), ("", "the empty prompt")):
        far = good.model_copy(update={"text_encoder": EncoderReport(sqnr=19.26, prompt=prompt, **sizes)})
        verdict = judge(far, recipe())
        assert verdict is not None
        assert (verdict.outcome, verdict.status) == ("failed", 4)
        assert verdict.reasons == [f"text encoder: 19.3 dB of {words}, required 20.0 dB; leave --text-encoder-bits out"]
    assert str(good.text_encoder) == "4.0 -> 1.1 MB, 21.0 dB at worst"


def test_an_export_without_audit_and_comparison_is_not_judged() -> None:
    bare = report().model_copy(update={"audit": None, "parity": None})
    assert judge(bare, recipe()) is None
    require(None)


@pytest.mark.parametrize(
    ("values", "sqnr", "model", "limit"),
    [
        ({}, 50.0, "model.onnx", "49.00"),
        ({}, 20.5, "model.onnx", "20.00"),  # a replay must not pass where the export fails
        ({"min_sqnr": 60}, 50.0, "model.onnx", "60.00"),
        ({"format": "trt", "dtype": "bf16"}, 50.0, "parity/model.onnx", "49.00"),
    ],
)
def test_the_replay_command_names_the_graph_and_a_limit_that_the_export_itself_must_keep(
    values: dict[str, Any], sqnr: float, model: str, limit: str
) -> None:
    result = concluded(report(call("float-onnx", 10), call("qdq-onnx", sqnr)), recipe(**values))
    assert result.parity is not None
    assert result.parity.replay == (
        f"polygraphy run {model} --onnxrt --load-inputs parity/inputs.json --load-outputs parity/outputs.json "
        f"--compare snr --snr-threshold {limit}"
    )
