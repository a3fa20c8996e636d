"""The audit tells integer GEMMs from float ones, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, load_graph, recipe_of
from onnx import parser

from dq_export.deploy.audit import Audit, AuditError, audit_ort
from dq_export.deploy.check.ort_unpacking import BYTES_SINCE
from dq_export.deploy.onnxruntime.cpu import ATTENTION_SINCE, OPTIMIZED, ORT, version
from dq_export.passes.base import run_passes
from dq_export.passes.legalise.unsign_codes import UnsignCodes
from dq_export.passes.pipeline import canonical_passes, factoring_passes

TOKENS, WIDTH, HEADS = 16, 32, 2


def audited(path: Path, calibrated: Any, folder: Path, *legalise: Any, spoil: Callable[[ir.Model], None] | None = None) -> Audit:
    graph = load_graph(path)
    run_passes(graph, (*canonical_passes(*calibrated), *legalise))
    if spoil:
        spoil(graph)
    model = folder / "model.onnx"
    ir.save(graph, model)
    ORT.build(model, folder / "engine")
    return audit_ort(model, folder / "engine" / OPTIMIZED, calibrated[1])


def test_all_quantized_gemms_run_in_integers(tiny_onnx: Path, tiny_calibrated: Any, tmp_path: Path) -> None:
    audit = audited(tiny_onnx, tiny_calibrated, tmp_path, *ORT.legalise(shared=True, result=tiny_calibrated[0]))
    assert audit.coverage == 1
    quantized = {name for name, rule in tiny_calibrated[1].items() if rule.action == "w8a8"}
    assert {gemm.name for gemm in audit.gemms if gemm.integer} == quantized
    unpacks = "MatMulNBits" if version() >= BYTES_SINCE else "MatMul"
    assert {gemm.kernel for gemm in audit.gemms if gemm.wanted == "weight-only"} == {unpacks}


def test_the_factored_per_sample_form_runs_in_integers(tiny_onnx_per_sample: Path, tiny_calibrated: Any, tmp_path: Path) -> None:
    audit = audited(tiny_onnx_per_sample, tiny_calibrated, tmp_path, *ORT.legalise(shared=False, result=tiny_calibrated[0]))
    assert audit.coverage == 1


def test_flops_are_those_of_the_formulas(tiny_onnx: Path, tiny_calibrated: Any, tmp_path: Path) -> None:
    audit = audited(tiny_onnx, tiny_calibrated, tmp_path, *ORT.legalise(shared=True, result=tiny_calibrated[0]))
    flops = {gemm.name: gemm.flops for gemm in audit.gemms}
    assert flops["transformer_blocks.0.attn1.to_q"] == 2 * TOKENS * WIDTH * WIDTH
    assert flops["transformer_blocks.1.ff.net.0.proj"] == 2 * TOKENS * WIDTH * 4 * WIDTH
    assert flops["transformer_blocks.1.norm1.linear"] == 2 * WIDTH * 6 * WIDTH
    attention = [gemm.flops for gemm in audit.gemms if gemm.wanted == "none"]
    product = 2 * TOKENS * TOKENS * WIDTH
    # Two blocks: scores and values together in one operator, or one after the other.
    assert attention == ([2 * product] * 2 if version() >= ATTENTION_SINCE else [product] * 4)
    assert audit.integer_share == sum(g.flops for g in audit.gemms if g.integer) / sum(
        flops.values() if len(flops) == len(audit.gemms) else []
    )


def nodes(graph: ir.Model, op: str, part: str) -> list[ir.Node]:
    return [node for node in graph.graph if node.op_type == op and part in str(node.name)]


def drop_activation_zero_points(graph: ir.Model) -> None:
    for node in [*nodes(graph, "QuantizeLinear", ""), *nodes(graph, "DequantizeLinear", "activation_dq")]:
        node.resize_inputs(2)
        if node.op_type == "QuantizeLinear":
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.INT8.value)


def drop_weight_zero_points(graph: ir.Model) -> None:
    for node in nodes(graph, "DequantizeLinear", "weight_dq"):
        node.resize_inputs(2)


def drop_activation_qdq(graph: ir.Model) -> None:
    for node in nodes(graph, "QuantizeLinear", ""):
        dequantize = next(iter(node.outputs[0].uses()))[0]
        for user, index in list(dequantize.outputs[0].uses()):
            user.replace_input_with(index, node.inputs[0])


@pytest.mark.parametrize(
    ("legalise", "spoil", "missing", "reason"),
    [
        ((), None, "to_q", "an int8 activation that several operators read; uint8"),
        ((), drop_activation_zero_points, "to_out.0", "the int8 QuantizeLinear of its activation has no zero point"),
        ((UnsignCodes(),), drop_activation_qdq, "to_out.0", "the activation has no DequantizeLinear before it"),
    ],
    ids=["int8-for-three", "no-activation-zero-point", "no-activation-qdq"],
)
def test_gemms_that_fall_back_to_float_are_named_with_the_reason(
    legalise: Any, spoil: Any, missing: str, reason: str, tiny_onnx: Path, tiny_calibrated: Any, tmp_path: Path
) -> None:
    audit = audited(tiny_onnx, tiny_calibrated, tmp_path, *legalise, spoil=spoil)
    assert audit.coverage < 1
    item = next(gemm for gemm in audit.gemms if gemm.name == f"transformer_blocks.0.attn1.{missing}")
    assert not item.integer
    assert reason in item.reason


def test_blocks_of_8_bits_need_a_later_version(tiny: Any, tiny_onnx: Path, tmp_path: Path) -> None:
    """As before version 1.25, which leaves the MatMuls of the graph as they are."""
    result, assigned = calibrate_tiny(tiny, recipe_of(tiny, bits="w8a16"))
    graph = load_graph(tiny_onnx)
    run_passes(graph, canonical_passes(result, assigned))
    ir.save(graph, tmp_path / "model.onnx")
    audit = audit_ort(tmp_path / "model.onnx", tmp_path / "model.onnx", assigned)
    assert audit.coverage == 0
    assert {gemm.reason for gemm in audit.gemms if gemm.wanted == "w8a16"} == {
        "before version 1.25, ONNX Runtime multiplies blocks of 8 bits in float; install that or a later one"
    }


def test_this_runtime_does_without_the_weights_zero_points(tiny_onnx: Path, tiny_calibrated: Any, tmp_path: Path) -> None:
    audit = audited(tiny_onnx, tiny_calibrated, tmp_path, UnsignCodes(), spoil=drop_weight_zero_points)
    assert audit.coverage == 1, "if this fails, the audit's reason for it must be tested instead"


def test_a_per_sample_table_in_direct_form_runs_in_float(
    tiny_onnx_per_sample: Path, tiny_calibrated: Any, tmp_path: Path
) -> None:
    audit = audited(tiny_onnx_per_sample, tiny_calibrated, tmp_path)
    assert audit.coverage == 0
    assert "along an axis" in next(gemm.reason for gemm in audit.gemms if gemm.wanted == "w8a8")


def test_a_missing_gemm_counts_against_the_coverage(tiny_onnx: Path, tiny_calibrated: Any, tmp_path: Path) -> None:
    def remove(graph: ir.Model) -> None:
        node = next(node for node in graph.graph if node.name == "transformer_blocks.0.attn1.to_q")
        node.metadata_props.clear()
        node.name = "other"  # a GEMM, but no longer that linear

    audit = audited(tiny_onnx, tiny_calibrated, tmp_path, *ORT.legalise(shared=True, result=tiny_calibrated[0]), spoil=remove)
    assert audit.coverage < 1
    assert "no such GEMM" in next(g.reason for g in audit.gemms if g.name == "transformer_blocks.0.attn1.to_q")


def test_a_two_dimensional_gemm_is_explained(tmp_path: Path) -> None:
    from dq_export.core.rule import Rule
    from dq_export.passes.match import SCOPES

    x = ir.Value(name="x", shape=ir.Shape([4, 16]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 21})
    from dq_export.passes.base import initializer

    scopes = {SCOPES: repr(["", "transformer", "transformer.fc", "l"])}
    scale, zero = initializer(graph, "s", np.asarray(0.1, np.float32)), initializer(graph, "z", np.asarray(128, np.uint8))
    codes = initializer(graph, "w", np.ones((16, 16), np.int8))
    scales, zeros = initializer(graph, "ws", np.full(16, 0.1, np.float32)), initializer(graph, "wz", np.zeros(16, np.int8))
    quantize = ir.node("QuantizeLinear", [x, scale, zero], name="q")
    activation = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name="dq")
    weight = ir.node("DequantizeLinear", [codes, scales, zeros], attributes={"axis": 1}, name="wdq")
    matmul = ir.node("MatMul", [activation.outputs[0], weight.outputs[0]], name="fc", metadata_props=scopes)
    add = ir.node("Add", [matmul.outputs[0], initializer(graph, "b", np.ones(16, np.float32))], name="add", metadata_props=scopes)
    add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([4, 16])
    graph.extend([quantize, activation, weight, matmul, add])
    graph.outputs.append(add.outputs[0])
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    ORT.build(tmp_path / "model.onnx", tmp_path / "engine")
    audit = audit_ort(tmp_path / "model.onnx", tmp_path / "engine" / OPTIMIZED, {"fc": Rule(match="", action="w8a8")})
    (gemm,) = audit.gemms
    assert not gemm.integer
    assert gemm.reason.startswith(
        "a bias in float, with which it is not an integer GEMM; MatMul and Add, with an input of rank 3"
    )


def test_static_tables_need_no_factoring(tiny: Any, tiny_onnx: Path, tmp_path: Path) -> None:
    calibrated = calibrate_tiny(tiny, recipe_of(tiny, bins=1))
    graph = load_graph(tiny_onnx)
    reports = run_passes(graph, (*canonical_passes(*calibrated), *factoring_passes(calibrated[0]), UnsignCodes()))
    assert reports[-2].changed == ()
    assert audited(tiny_onnx, calibrated, tmp_path, *ORT.legalise(shared=True, result=calibrated[0])).coverage == 1


def test_a_damaged_graph_is_named(tmp_path: Path) -> None:
    model, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    onnx.save(
        parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] y) { y = Abs(x) }'), model
    )
    for damaged, content in ((optimized, b"\x0a\xff\xff"), (model, b"\xff" * 99)):
        damaged.write_bytes(content)
        with pytest.raises(AuditError, match=rf"{damaged.name}: not readable as ONNX; was it cut short"):
            audit_ort(model, optimized, {})
