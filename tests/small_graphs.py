"""Graphs of a few nodes for the tests of passes, and calibrations that fit them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.folds import explicit
from dq_export.core.network import InputSite
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable, TimestepBins
from dq_export.passes.base import GraphPass, initializer
from dq_export.passes.match import SCOPES

RANDOM = np.random.default_rng(0)
START = RANDOM.bit_generator.state
"""To which conftest.py sets it before each test."""
W8A8, FLOAT, BLOCKS = Rule(match="", action="w8a8"), Rule(match="", action="float"), Rule(match="", action="weight-only")


class Builder:
    """A graph written node by node."""

    def __init__(self, **inputs: tuple[ir.DataType, list[Any]]) -> None:
        values = [ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(t)) for n, (t, s) in inputs.items()]
        self.graph = ir.Graph(values, [], nodes=[], name="g", opset_imports={"": 21})
        self.value = {str(v.name): v for v in values}

    @staticmethod
    def of(model: ir.Model) -> Builder:
        """A graph to go on with."""
        b = Builder()
        b.graph, b.value = model.graph, {str(v.name): v for v in model.graph.inputs}
        return b

    def weight(self, name: str, *shape: int) -> ir.Value:
        return initializer(self.graph, name, RANDOM.normal(size=shape).astype(np.float32))

    def const(self, name: str, value: Any) -> ir.Value:
        return initializer(self.graph, name, np.asarray(value))

    def node(
        self, op: str, *inputs: ir.Value, module: str = "", outputs: int = 1, shape: list[Any] | None = None, **attributes: Any
    ) -> Any:
        created = ir.node(op, list(inputs), attributes=attributes, num_outputs=outputs, name=f"{op}_{len(self.graph)}")
        if module:
            created.metadata_props[SCOPES] = repr(["", "transformer", f"transformer.{module}", "linear"])
        for i, out in enumerate(created.outputs):
            out.name = f"{op.lower()}{len(self.graph)}" + (f"_{i}" if outputs > 1 else "")
            out.type = ir.TensorType(ir.DataType.FLOAT)
            if shape is not None:
                out.shape = ir.Shape(shape)
        self.graph.append(created)
        return created.outputs[0] if outputs == 1 else created.outputs

    def shaped(self, *outputs: ir.Value) -> ir.Model:
        """The model, with the shape of every value."""
        model = self.model(*outputs)
        ShapeInferencePass()(model)
        return model

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


def modulated() -> ir.Model:
    """x * (1 + scale) + shift with [shift, scale] = linear(c)."""
    b = Builder(c=(ir.DataType.FLOAT, ["B", 4]), x=(ir.DataType.FLOAT, ["B", 3, 8]))
    c = b.value["c"]
    result = b.node("Gemm", c, b.weight("w", 16, 4), b.weight("bias", 16), module="norm1.linear", transB=1)
    shift, scale = b.node("Split", result, outputs=2, axis=1, num_outputs=2)
    axis = b.const("axis", np.asarray([1]))
    scale3, shift3 = b.node("Unsqueeze", scale, axis), b.node("Unsqueeze", shift, axis)
    plus = b.node("Add", scale3, b.const("one", np.float32(1)))
    return b.model(b.node("Add", b.node("Mul", b.value["x"], plus), shift3, shape=["B", 3, 8]))


def modulation_feed() -> dict[str, Any]:
    return {"c": RANDOM.normal(size=(2, 4)).astype(np.float32), "x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32)}


def linear_model(timestep: list[Any], readers: int = 1) -> ir.Model:
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), timestep=(ir.DataType.INT64, timestep))
    result = [b.node("MatMul", b.value["x"], b.weight(f"w{i}", 8, 8), module=f"fc{i}", shape=["B", 3, 8]) for i in range(readers)]
    for i, node in enumerate(list(b.graph)):
        node.name = f"fc{i}"
    return b.model(*result)


def site_of(readers: int = 1) -> InputSite:
    return InputSite(name="fc0", linears=tuple(f"fc{i}" for i in range(readers)), fold=explicit("fc0", 8))
