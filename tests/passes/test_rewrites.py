"""Each pass on graphs of a few nodes: text before and after, and where it must not act."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.network import InputSite
from dq_export.core.recipe import Rule
from dq_export.core.scales import ScaleTable, TimestepBins
from dq_export.passes.base import GraphError, GraphPass, initializer, run_passes
from dq_export.passes.canonical.absorb_one import AbsorbOne
from dq_export.passes.canonical.fold_scaling import FoldScaling
from dq_export.passes.canonical.insert_qdq import InsertQdq
from dq_export.passes.canonical.lift_modulation import LiftModulation
from dq_export.passes.canonical.merge_duplicates import MergeDuplicates
from dq_export.passes.canonical.quantize_weights import QuantizeWeights
from dq_export.passes.legalise.factor_scale import FactorScale
from dq_export.passes.legalise.raise_biases import RaiseBiases
from dq_export.passes.legalise.unsign_codes import UnsignCodes
from dq_export.passes.match import SCOPES

RANDOM = np.random.default_rng(0)
W8A8, FLOAT, BLOCKS = Rule(match="", action="w8a8"), Rule(match="", action="float"), Rule(match="", action="weight-only")


class Builder:
    """A graph written node by node."""

    def __init__(self, **inputs: tuple[ir.DataType, list[Any]]) -> None:
        values = [ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(t)) for n, (t, s) in inputs.items()]
        self.graph = ir.Graph(values, [], nodes=[], name="g", opset_imports={"": 21})
        self.value = {str(v.name): v for v in values}

    def weight(self, name: str, *shape: int) -> ir.Value:
        return initializer(self.graph, name, RANDOM.normal(size=shape).astype(np.float32))

    def const(self, name: str, value: Any) -> ir.Value:
        return initializer(self.graph, name, np.asarray(value))

    def node(
        self, op: str, *inputs: ir.Value, module: str = "", outputs: int = 1, shape: list[Any] | None = None, **attributes: Any
    ) -> Any:
        made = ir.node(op, list(inputs), attributes=attributes, num_outputs=outputs, name=f"{op}_{len(self.graph)}")
        if module:
            made.metadata_props[SCOPES] = repr(["", "transformer", f"transformer.{module}", "linear"])
        for i, out in enumerate(made.outputs):
            out.name = f"{op.lower()}{len(self.graph)}" + (f"_{i}" if outputs > 1 else "")
            out.type = ir.TensorType(ir.DataType.FLOAT)
            if shape is not None:
                out.shape = ir.Shape(shape)
        self.graph.append(made)
        return made.outputs[0] if outputs == 1 else made.outputs

    def model(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=10)


def listing(model: ir.Model) -> list[str]:
    """One line a node: operator and the operators or values that it reads."""

    def source(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        producer = value.producer()
        return producer.op_type if producer is not None else str(value.name)

    return [f"{node.op_type}({', '.join(source(v) for v in node.inputs)})" for node in model.graph]


def unchanged(model: ir.Model, item: GraphPass) -> str:
    """Run a pass that must not act; its reasons."""
    before = listing(model)
    report = item.rewrite(model)
    assert report.changed == ()
    assert listing(model) == before
    return " ".join(report.skipped)


def result_of(site: InputSite, width: int, *, scaled: bool = True, bins: int = 2, out: int = 8) -> CalibrationResult:
    in_scale = np.linspace(0.5, 2, width, dtype=np.float32) if scaled else np.ones(width, dtype=np.float32)
    in_shift = np.linspace(-1, 1, width, dtype=np.float32) * (1 if scaled else 0)
    table = ScaleTable(
        scale=np.linspace(0.02, 0.05, bins).astype(np.float32),
        bins=TimestepBins(edges=tuple(float(100 * (i + 1)) for i in range(bins - 1))),
    )
    plan = SitePlan(site=site, method="test", in_scale=in_scale, in_shift=in_shift, activation=table)
    weights = {name: np.full(out, 0.03, dtype=np.float32) for name in site.linears}
    return CalibrationResult(sites={site.name: plan}, weight_scale=weights, provenance={})


# --- merge_duplicates


def test_merge_duplicates() -> None:
    b = Builder(x=(ir.DataType.FLOAT, [2, 4]))
    same = RANDOM.normal(size=(4, 4)).astype(np.float32)
    one = b.node("MatMul", b.value["x"], b.const("w1", same), module="a.linear")
    two = b.node("MatMul", b.value["x"], b.const("w2", same), module="b.linear")
    model = b.model(b.node("Add", one, two, shape=[2, 4]))
    assert listing(model) == ["MatMul(x, w1)", "MatMul(x, w2)", "Add(MatMul, MatMul)"]
    run_passes(model, [MergeDuplicates()])
    assert listing(model) == ["MatMul(x, w1)", "Add(MatMul, MatMul)"]
    assert next(iter(model.graph)).name == "a.linear"


def test_merge_duplicates_keeps_what_differs_in_a_bit() -> None:  # case 1
    b = Builder(x=(ir.DataType.FLOAT, [2, 4]))
    weight = RANDOM.normal(size=(4, 4)).astype(np.float32)
    other = weight.copy()
    other[0, 0] = np.nextafter(other[0, 0], np.float32(9))
    one, two = (b.node("MatMul", b.value["x"], b.const(f"w{i}", w)) for i, w in enumerate((weight, other)))
    model = b.model(b.node("Add", one, two, shape=[2, 4]))
    assert MergeDuplicates().rewrite(model).changed == ()
    assert len(model.graph) == 3


# --- absorb_one


def modulated(*, constant: float = 1.0, second_reader: bool = False, linear: bool = True) -> ir.Model:
    """x * (1 + scale) + shift with [shift, scale] = linear(c)."""
    b = Builder(c=(ir.DataType.FLOAT, ["B", 4]), x=(ir.DataType.FLOAT, ["B", 3, 8]))
    c = b.value["c"]
    made = b.node("Gemm", c, b.weight("w", 16, 4), b.weight("bias", 16), module="norm1.linear", transB=1) if linear else None
    source = made if made is not None else b.node("Concat", c, c, c, c, axis=1)
    shift, scale = b.node("Split", source, outputs=2, axis=1, num_outputs=2)
    axis = b.const("axis", np.asarray([1]))
    scale3, shift3 = b.node("Unsqueeze", scale, axis), b.node("Unsqueeze", shift, axis)
    plus = b.node("Add", scale3, b.const("one", np.float32(constant)))
    y = b.node("Add", b.node("Mul", b.value["x"], plus), shift3, shape=["B", 3, 8])
    return b.model(y, b.node("Neg", scale3, shape=["B", 1, 8])) if second_reader else b.model(y)


def modulation_feed() -> dict[str, Any]:
    return {"c": RANDOM.normal(size=(2, 4)).astype(np.float32), "x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32)}


def test_absorb_one() -> None:
    model, feed = modulated(), modulation_feed()
    before = run_onnx(model, feed)
    assert "Add(Unsqueeze, one)" in listing(model)
    run_passes(model, [AbsorbOne()])
    assert listing(model) == [
        "Gemm(c, w, norm1.linear.bias)",
        "Split(Gemm)",
        "Unsqueeze(Split, axis)",
        "Unsqueeze(Split, axis)",
        "Mul(x, Unsqueeze)",
        "Add(Mul, Unsqueeze)",
    ]
    # One addition is done before the row's sum instead of after: a few float32 roundings.
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"linear": False}, r"case 1"), ({"second_reader": True}, r"case 2"), ({"constant": 1.5}, "")],
    ids=["case-1", "case-2", "case-3"],
)
def test_absorb_one_must_not_act(options: dict[str, Any], reason: str) -> None:
    assert reason in unchanged(modulated(**options), AbsorbOne())


# --- fold_scaling


def test_fold_scaling_into_the_modulation_and_explicitly() -> None:
    b = Builder(c=(ir.DataType.FLOAT, ["B", 4]), x=(ir.DataType.FLOAT, ["B", 3, 8]))
    mod = b.node("Gemm", b.value["c"], b.weight("w", 16, 4), b.weight("bias", 16), module="norm1.linear", transB=1)
    shift, gain = b.node("Split", mod, outputs=2, axis=1, num_outputs=2)
    axis = b.const("axis", np.asarray([1]))
    h = b.node("Add", b.node("Mul", b.value["x"], b.node("Unsqueeze", gain, axis)), b.node("Unsqueeze", shift, axis))
    q = b.node("MatMul", h, b.weight("wq", 8, 8), module="to_q")
    model = b.model(b.node("Add", q, b.weight("bq", 8), module="to_q", shape=["B", 3, 8]))
    feed = modulation_feed()
    exact = run_onnx(model, feed)
    site = InputSite(
        name="to_q", linears=("to_q",), fold="modulation", producer="norm1.linear", shift_rows=(0, 8), scale_rows=(8, 16)
    )
    nodes = listing(model)
    run_passes(model, [FoldScaling(result=result_of(site, 8))])
    assert [line.split("(")[0] for line in listing(model)] == [line.split("(")[0] for line in nodes], "F1 adds no node"
    np.testing.assert_allclose(run_onnx(model, feed), exact, rtol=1e-4, atol=2e-5)  # sums of about 10 terms of size 1
    again = FoldScaling(result=result_of(site, 8)).rewrite(model)
    assert "case 2" in again.skipped[0]
    explicit = InputSite(name="fc2", linears=("fc2",), fold="explicit")
    other = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]))
    model = other.model(other.node("MatMul", other.value["x"], other.weight("w", 8, 8), module="fc2", shape=["B", 3, 8]))
    exact = run_onnx(model, {"x": feed["x"]})
    run_passes(model, [FoldScaling(result=result_of(explicit, 8))])
    assert listing(model) == [
        "Mul(x, fc2.inverse_in_scale)",
        "Add(Mul, fc2.scaled_in_shift)",
        "MatMul(Add, fc2.weight)",
        "Add(MatMul, fc2.bias)",
    ]
    np.testing.assert_allclose(run_onnx(model, {"x": feed["x"]}), exact, rtol=1e-4, atol=2e-5)


def test_fold_scaling_must_not_act_without_a_scaling() -> None:  # case 1
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]))
    model = b.model(b.node("MatMul", b.value["x"], b.weight("w", 8, 8), module="fc2", shape=["B", 3, 8]))
    site = InputSite(name="fc2", linears=("fc2",), fold="explicit")
    assert "case 1" in unchanged(model, FoldScaling(result=result_of(site, 8, scaled=False)))


def test_fold_scaling_needs_the_one_absorbed() -> None:
    site = InputSite(name="q", linears=("q",), fold="modulation", producer="norm1.linear", shift_rows=(0, 8), scale_rows=(8, 16))
    model = modulated()
    graph = model.graph
    wq = initializer(graph, "wq", np.eye(8, dtype=np.float32))
    matmul = ir.node(
        "MatMul", [graph.outputs[0], wq], name="q", metadata_props={SCOPES: repr(["", "transformer", "transformer.q", "l"])}
    )
    graph.append(matmul)
    with pytest.raises(GraphError, match=r"'1 \+' of adaLN is not absorbed"):
        FoldScaling(result=result_of(site, 8)).rewrite(model)


# --- lift_modulation


def test_lift_modulation() -> None:
    model, feed = modulated(), modulation_feed()
    run_passes(model, [AbsorbOne()])
    before = run_onnx(model, feed)
    run_passes(model, [LiftModulation(assigned={"norm1.linear": BLOCKS})])
    assert listing(model) == [
        "Unsqueeze(c, norm1.linear.token_axis)",
        "MatMul(Unsqueeze, norm1.linear.weight)",
        "Add(MatMul, norm1.linear.bias)",
        "Split(Add)",
        "Mul(x, Split)",
        "Add(Mul, Split)",
    ]
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=1e-5, atol=1e-6)  # another kernel for the same sums


def test_lift_modulation_must_not_act() -> None:
    assert unchanged(modulated(), LiftModulation(assigned={"norm1.linear": FLOAT})) == ""  # case 1
    b = Builder(c=(ir.DataType.FLOAT, ["B", 4]))
    mod = b.node("Gemm", b.value["c"], b.weight("w", 16, 4), b.weight("b", 16), module="norm1.linear", transB=1)
    one, two = b.node("Split", mod, outputs=2, axis=1, num_outputs=2)
    model = b.model(b.node("Mul", one, two, shape=["B", 8]))
    assert "case 2" in unchanged(model, LiftModulation(assigned={"norm1.linear": BLOCKS}))


# --- quantize_weights, insert_qdq


def linear_model(timestep: list[Any], readers: int = 1) -> ir.Model:
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), timestep=(ir.DataType.INT64, timestep))
    made = [b.node("MatMul", b.value["x"], b.weight(f"w{i}", 8, 8), module=f"fc{i}", shape=["B", 3, 8]) for i in range(readers)]
    for i, node in enumerate(list(b.graph)):
        node.name = f"fc{i}"
    return b.model(*made)


def site_of(readers: int = 1) -> InputSite:
    return InputSite(name="fc0", linears=tuple(f"fc{i}" for i in range(readers)), fold="explicit")


def test_quantize_weights() -> None:
    model = linear_model([1])
    result = result_of(site_of(), 8)
    run_passes(model, [QuantizeWeights(result=result, assigned={"fc0": W8A8})])
    assert listing(model) == [
        "DequantizeLinear(fc0.weight_codes, fc0.weight_scale, fc0.weight_zero_point)",
        "MatMul(x, DequantizeLinear)",
    ]
    zero = model.graph.initializers["fc0.weight_zero_point"].const_value
    assert zero is not None
    assert zero.dtype == ir.DataType.INT8


def test_quantize_weights_must_not_act() -> None:
    result = result_of(site_of(), 8)
    assert "case 1" in unchanged(linear_model([1]), QuantizeWeights(result=result, assigned={"fc0": FLOAT}))
    model = linear_model([1])
    run_passes(model, [QuantizeWeights(result=result, assigned={"fc0": W8A8})])
    unchanged(model, QuantizeWeights(result=result, assigned={"fc0": W8A8}))  # case 2


def test_quantize_weights_refuses_a_gemm() -> None:
    result = CalibrationResult(sites={}, weight_scale={"norm1.linear": np.ones(16, dtype=np.float32)}, provenance={})
    with pytest.raises(GraphError, match=r"'norm1.linear' is a Gemm"):
        QuantizeWeights(result=result, assigned={"norm1.linear": BLOCKS}).rewrite(modulated())


def test_quantize_weights_refuses_scales_of_another_model() -> None:
    with pytest.raises(GraphError, match=r"'fc0': expected scales \(8,\) for a weight \(8, 8\), found \(6,\)"):
        QuantizeWeights(result=result_of(site_of(), 8, out=6), assigned={"fc0": W8A8}).rewrite(linear_model([1]))


def test_insert_qdq_with_a_table() -> None:
    model = linear_model([1], readers=2)
    assigned = {"fc0": W8A8, "fc1": W8A8}
    run_passes(model, [InsertQdq(result=result_of(site_of(2), 8), assigned=assigned)])
    assert listing(model) == [
        "Cast(timestep)",
        "Unsqueeze(Cast, timestep_axis)",
        "GreaterOrEqual(Unsqueeze, timestep_edges)",
        "Cast(GreaterOrEqual)",
        "ReduceSum(Cast, timestep_axis)",
        "Squeeze(ReduceSum)",
        "Gather(fc0.activation_scale_table, Squeeze)",
        "QuantizeLinear(x, Gather, activation_zero_point)",
        "DequantizeLinear(QuantizeLinear, Gather, activation_zero_point)",
        "MatMul(DequantizeLinear, w0)",
        "MatMul(DequantizeLinear, w1)",
    ]


def test_insert_qdq_with_one_bin_is_static() -> None:
    model = linear_model([1])
    run_passes(model, [InsertQdq(result=result_of(site_of(), 8, bins=1), assigned={"fc0": W8A8})])
    assert listing(model) == [
        "QuantizeLinear(x, fc0.activation_scale, activation_zero_point)",
        "DequantizeLinear(QuantizeLinear, fc0.activation_scale, activation_zero_point)",
        "MatMul(DequantizeLinear, w0)",
    ]


def test_insert_qdq_must_not_act() -> None:
    result = result_of(site_of(), 8)
    unchanged(linear_model([1]), InsertQdq(result=result, assigned={"fc0": FLOAT}))  # case 1
    model = linear_model([1])
    run_passes(model, [InsertQdq(result=result, assigned={"fc0": W8A8})])
    unchanged(model, InsertQdq(result=result, assigned={"fc0": W8A8}))  # case 2


def test_insert_qdq_leaves_a_float_reader_on_the_float_input() -> None:
    model = linear_model([1], readers=2)
    run_passes(model, [InsertQdq(result=result_of(site_of(2), 8), assigned={"fc0": W8A8, "fc1": FLOAT})])
    assert listing(model)[-2:] == ["MatMul(DequantizeLinear, w0)", "MatMul(x, w1)"]


# --- factor_scale, unsign_codes


@pytest.mark.parametrize("timestep", [[1], ["B"]], ids=["shared", "per-sample"])
def test_factor_scale(timestep: list[Any]) -> None:
    model = linear_model(timestep)
    run_passes(model, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    feed = {
        "x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32),
        "timestep": np.asarray([150] if timestep == [1] else [150, 50]),
    }
    direct = run_onnx(model, feed)
    run_passes(model, [FactorScale()])
    found = listing(model)
    assert "QuantizeLinear(Mul, fc0.activation_constant_scale, fc0.activation_zero_point)" in found
    assert found[-1] == ("Mul(MatMul, Gather)" if timestep == [1] else "Mul(MatMul, Unsqueeze)")
    np.testing.assert_allclose(run_onnx(model, feed), direct, rtol=1e-5, atol=1e-5)  # no value sits on a boundary here


def test_factor_scale_must_not_act() -> None:
    static = linear_model([1])
    run_passes(static, [InsertQdq(result=result_of(site_of(), 8, bins=1), assigned={"fc0": W8A8})])
    assert unchanged(static, FactorScale()) == ""  # case 1
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), s=(ir.DataType.FLOAT, []))
    zero = b.const("zero", np.int8(0))
    scale = b.node("Abs", b.value["s"])
    codes = b.node("QuantizeLinear", b.value["x"], scale, zero)
    model = b.model(b.node("DequantizeLinear", codes, scale, zero, shape=["B", 3, 8]))
    assert "case 2" in unchanged(model, FactorScale())
    read = linear_model([1])
    run_passes(read, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    dequantized = next(node for node in read.graph if node.op_type == "DequantizeLinear")
    read.graph.append(ir.node("Relu", [dequantized.outputs[0]], name="relu"))
    assert "case 3" in unchanged(read, FactorScale())


def biased_model(rank: int, *, dequantized: bool = True, bias_shape: tuple[int, ...] = (4,), users: int = 1) -> ir.Model:
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8][-rank:]))
    weight = b.const(
        "codes" if dequantized else "weight", RANDOM.integers(-9, 9, (8, 4)).astype(np.int8 if dequantized else np.float32)
    )
    if dequantized:
        weight = b.node("DequantizeLinear", weight, b.const("s", np.float32(0.1)), b.const("z", np.int8(0)), shape=[8, 4])
    shape = ["B", 3, 4][-rank:]
    product = b.node("MatMul", b.value["x"], weight, module="fc0", shape=shape)
    bias = b.const("b", RANDOM.normal(size=bias_shape).astype(np.float32))
    outputs = [b.node("Add", bias, product, module="fc0", shape=shape)]
    outputs += [b.node("Relu", product, shape=shape) for _ in range(users - 1)]
    return b.model(*outputs)


def test_raise_biases() -> None:
    model = biased_model(3)
    feed = {"x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32)}
    before = run_onnx(model, feed)
    run_passes(model, [RaiseBiases()])
    add = next(node for node in model.graph if node.op_type == "Add")
    assert [list(value.shape or ()) for value in add.inputs if value is not None and value.const_value is not None] == [[1, 1, 4]]
    np.testing.assert_array_equal(run_onnx(model, feed), before)


def test_raise_biases_must_not_act() -> None:
    for model, case in (
        (biased_model(2), "case 1"),  # the bias would add a dimension to the result
        (biased_model(3, bias_shape=(3, 4)), "case 2"),
        (biased_model(3, bias_shape=(1, 1, 4)), "case 2"),
        (biased_model(3, users=2), "case 2"),
        (biased_model(3, dequantized=False), "case 3"),
    ):
        assert f": {case}: " in unchanged(model, RaiseBiases())


def test_unsign_codes() -> None:
    model = linear_model([1])
    run_passes(model, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    feed = {"x": 9 * RANDOM.normal(size=(2, 3, 8)).astype(np.float32), "timestep": np.asarray([150])}  # saturates too
    signed = run_onnx(model, feed)
    run_passes(model, [UnsignCodes()])
    assert "QuantizeLinear(x, Gather, activation_zero_point_uint8)" in listing(model)
    np.testing.assert_array_equal(run_onnx(model, feed), signed)


def test_unsign_codes_must_not_act() -> None:
    per_sample = linear_model(["B"])
    run_passes(per_sample, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    assert "cases 1, 2" in unchanged(per_sample, UnsignCodes())
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]))
    scale, zero = b.const("s", np.ones(8, dtype=np.float32)), b.const("z", np.zeros(8, dtype=np.int8))
    codes = b.node("QuantizeLinear", b.value["x"], scale, zero, axis=2)
    model = b.model(b.node("DequantizeLinear", codes, scale, zero, axis=2, shape=["B", 3, 8]))
    assert "cases 1, 2" in unchanged(model, UnsignCodes())
