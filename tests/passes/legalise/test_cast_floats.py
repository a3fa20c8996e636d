"""Half precision around the quantized GEMMs, and its twin that a CPU can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import feed_of, load_graph, run_onnx, sqnr
from small_graphs import Builder

from dq_export.passes.base import run_passes
from dq_export.passes.legalise.cast_floats import CastFloats
from dq_export.passes.legalise.widen_floats import WidenFloats
from dq_export.passes.pipeline import canonical_passes, factoring_passes

HALF, BRAIN = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def small(path: Path, calibrated: Any, dtype: ir.DataType) -> ir.Model:
    model = load_graph(path)
    model.ir_version = 10
    run_passes(model, (*canonical_passes(*calibrated), *factoring_passes(calibrated[0]), CastFloats(dtype=dtype)))
    return model


def types_of(node: ir.Node) -> set[str]:
    values = [*node.inputs, *node.outputs]
    return {value.dtype.name for value in values if value is not None and value.dtype in (ir.DataType.FLOAT, HALF, BRAIN)}


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_a_chain_has_one_float_type(dtype: ir.DataType, tiny_onnx_per_sample: Path, tiny_calibrated: Any) -> None:
    model = small(tiny_onnx_per_sample, tiny_calibrated, dtype)
    chains = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMul", "Softmax", "Conv")]
    assert len(chains) > 40
    assert all(types_of(node) == {dtype.name} for node in chains)
    assert {value.dtype for value in (*model.graph.inputs[:1], *model.graph.outputs)} == {ir.DataType.FLOAT}
    assert [value.name for value in model.graph.outputs] == ["sample"]


def test_case_1_the_conditioning_and_the_bins_stay_float32(tiny_onnx_per_sample: Path, tiny_calibrated: Any) -> None:
    model = small(tiny_onnx_per_sample, tiny_calibrated, HALF)
    for kind in ("Sin", "Cos", "GreaterOrEqual", "Gemm"):
        nodes = [node for node in model.graph if node.op_type == kind]
        assert nodes
        assert all(types_of(node) == {"FLOAT"} for node in nodes), kind
    # The modulation, behind the first quantized weight, does not.
    dequantized = [node for node in model.graph if node.op_type == "DequantizeLinear" and "norm1" in str(node.name)]
    assert dequantized
    assert all(types_of(node) == {"FLOAT16"} for node in dequantized)


def text_model() -> ir.Model:
    """x + sin(row) against quantized keys of a text, which depend on no state."""
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), text=(ir.DataType.FLOAT, ["B", 5, 8]))
    axis, scale, zero = b.const("axis", [1]), b.const("scale", np.float32(0.02)), b.const("zero", np.int8(0))
    rows = b.node("Squeeze", b.node("Shape", b.value["x"], start=1, end=2))
    for value in (rows, rows.producer().inputs[0]):
        value.dtype = ir.DataType.INT64
    limit = b.node("Cast", rows, to=ir.DataType.FLOAT.value)
    positions = b.node("Sin", b.node("Range", b.const("start", np.float32(0)), limit, b.const("step", np.float32(1))))
    states = b.node("Add", b.value["x"], b.node("Unsqueeze", positions, axis))
    codes = b.node("QuantizeLinear", b.value["text"], scale, zero)
    codes.dtype = ir.DataType.INT8
    weight = b.node("DequantizeLinear", b.const("codes", np.arange(64, dtype=np.int8).reshape(8, 8)), scale, zero)
    keys = b.node("MatMul", b.node("DequantizeLinear", codes, scale, zero), weight, module="to_k")
    return b.shaped(b.node("MatMul", states, b.node("Transpose", keys, perm=[0, 2, 1])))


def test_case_1_what_the_states_sizes_decide_stays_float32_and_quantized_keys_of_a_text_do_not() -> None:
    model = text_model()
    rng = np.random.default_rng(0)
    feed = {name: rng.normal(size=(2, count, 8)).astype(np.float32) for name, count in (("x", 3), ("text", 5))}
    exact = run_onnx(model, feed)
    run_passes(model, [CastFloats(dtype=HALF)])
    kinds = {node.op_type: types_of(node) for node in model.graph if node.op_type != "Cast"}
    assert [kinds[name] for name in ("Range", "Sin")] == [{"FLOAT"}] * 2, "an angle of 100 has one digit in float16"
    assert [kinds[name] for name in ("QuantizeLinear", "DequantizeLinear", "MatMul")] == [{"FLOAT16"}] * 3
    assert sqnr(exact, run_onnx(model, feed)) > 40


def test_case_2_layer_normalization_stays_float32(tiny_onnx_per_sample: Path, tiny_calibrated: Any) -> None:
    model = small(tiny_onnx_per_sample, tiny_calibrated, HALF)
    nodes = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert len(nodes) == 5
    assert all(types_of(node) == {"FLOAT"} for node in nodes)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_case_3_the_factors_of_an_upsampling_stay_float32(dtype: ir.DataType) -> None:
    b = Builder(x=(ir.DataType.FLOAT, ["B", 2, 3, 3]))
    none: Any = None  # a Resize goes without a region
    factors = b.const("factors", np.asarray([1, 1, 2, 2], dtype=np.float32))
    scaled = b.node("Mul", b.value["x"], b.const("half", np.float32(0.5)))
    model = b.shaped(b.node("Resize", scaled, none, factors, mode="nearest", coordinate_transformation_mode="asymmetric"))
    run_passes(model, [CastFloats(dtype=dtype)])
    resize = next(node for node in model.graph if node.op_type == "Resize")
    assert [value.dtype for value in (resize.inputs[0], resize.inputs[2], resize.outputs[0]) if value] == [
        dtype,
        ir.DataType.FLOAT,
        dtype,
    ]
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 3)).astype(np.float32)
    run_passes(model, [WidenFloats()])
    assert sqnr(x.repeat(2, 2).repeat(2, 3) / 2, run_onnx(model, {"x": x})) > 40


def test_a_residual_that_float16_cannot_hold_is_seen_on_the_cpu(tiny: Any, tiny_onnx: Path) -> None:
    """ONNX Runtime rounds after every operator, so what overflows on a GPU overflows in the parity check, too."""
    model = load_graph(tiny_onnx)
    model.ir_version = 10
    run_passes(model, [CastFloats(dtype=HALF)])
    feed = feed_of(tiny)
    assert np.isfinite(run_onnx(model, feed)).all()
    loud = {**feed, "hidden_states": feed["hidden_states"] * np.float32(1e5)}
    assert np.isfinite(run_onnx(load_graph(tiny_onnx), loud)).all()
    assert not np.isfinite(run_onnx(model, loud)).all()


def test_the_twin_has_the_numbers_of_bfloat16(tiny: Any, tiny_onnx: Path) -> None:
    """Without quantization: against PyTorch's own bfloat16 both are some 40 dB from float32, and near each other."""
    model = load_graph(tiny_onnx)
    run_passes(model, [CastFloats(dtype=BRAIN), WidenFloats()])
    types = {value.dtype for node in model.graph if node.op_type != "Cast" for value in node.outputs}
    assert BRAIN not in types
    feed = feed_of(tiny)
    exact, twin = tiny.forward(feed), run_onnx(model, feed)
    torch_noise, noise = sqnr(exact, tiny.in_dtype("bf16")(feed)), sqnr(exact, twin)
    # Not the same roundings: the embedders stay float32 here, and kernels fuse. The same number of bits.
    assert abs(noise - torch_noise) < 8
    assert 25 < noise < 60


def test_the_twin_of_a_float32_graph_is_itself(tiny_onnx: Path) -> None:
    model = load_graph(tiny_onnx)
    (report,) = run_passes(model, [WidenFloats()])
    assert report.changed == ()


def test_twice_is_once(tiny_onnx: Path) -> None:
    model = load_graph(tiny_onnx)
    first, second = run_passes(model, [CastFloats(dtype=HALF), CastFloats(dtype=HALF)])
    assert first.changed
    assert second.changed == ()
