"""Convolutions of codes, as ONNX Runtime's CPU kernels want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.qtypes import UINT8

from ..base import GraphPass, PassReport, computed_initializer, constant, initializer, like, redirect, stored
from ..match import only_user
from ..names import FACTOR

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class IntegerConvolutions(GraphPass):
    """Q(s, int8 0) -> DQ -> Conv(., DQ(w, v), b)  ->  Q(s, int8 0) -> ConvInteger(., w + 128, 0, 128) -> Cast -> * (s v) -> + b.

    v[N] are the weight's scales. A factor behind the Conv, of a table that factor_scale brought there, goes into that Mul.

    ONNX Runtime fuses a Conv between DequantizeLinears only where its result is quantized, too, which rounds it, and never
    one whose scale comes from a table. Of ConvInteger's four pairs of types int8 activations with uint8 weights run on
    VNNI: 3.1 to 3.7 times as fast as float for 3x3 kernels and 7 for 1x1; others down to a third of float's speed.
    Before 1.24 it takes uint8 for both alone: see unsign_codes.

    It does not act where
        1. the activation's codes are not int8 with the zero point 0, or the weight's not int8 with a scale for each output,
        2. the activation's scale is not one number for the whole tensor.

    Exactness: the sums of products of codes are exact, and so is all up to their float32 rounding.
    Source: measured with ONNX Runtime 1.31 on AVX512-VNNI.
    """

    name: ClassVar[str] = "integer_convolutions"
    after: ClassVar[tuple[str, ...]] = ("quantize_weights", "insert_qdq", "factor_scale", "clip_codes")

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for node in [node for node in model.graph if node.op_type == "Conv"]:
            activation, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
            if activation is None or weight is None or {activation.op_type, weight.op_type} != {"DequantizeLinear"}:
                continue
            if reason := _refusal(activation, weight):
                skipped.append(f"'{node.name}': {reason}")
                continue
            changed.append(f"'{node.name}'")
            _replace(model.graph, node, activation, weight)
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _refusal(activation: ir.Node, weight: ir.Node) -> str:
    """The case in which the pass must not act; empty where it may."""
    point, codes = constant(activation.inputs[2]) if len(activation.inputs) > 2 else None, stored(weight.inputs[0])
    if point is None or point.dtype != np.int8 or point.any():
        return "case 1: its input's codes are not int8 with the zero point 0"
    if codes is None or codes.dtype != ir.DataType.INT8 or weight.attributes.get_int("axis", 1) != 0:
        return "case 1: its weight's codes are not int8 with a scale for each output channel"
    scale = activation.inputs[1]
    if scale is None or scale.shape is None or len(scale.shape) > 0:
        return "case 2: its input has more scales than one"
    return ""


def _replace(graph: ir.Graph, node: ir.Node, activation: ir.Node, weight: ir.Node) -> None:
    product = _product(graph, node, activation, weight)
    cast = ir.node("Cast", [product.outputs[0]], attributes={"to": ir.DataType.FLOAT.value})
    scales, scale = constant(weight.inputs[1]), activation.inputs[1]
    assert scales is not None
    column, fixed = scales.reshape(-1, 1, 1).astype(np.float32), constant(scale)
    column = column if fixed is None else (column * fixed.astype(np.float32)).astype(np.float32)
    factor, nodes = initializer(graph, f"{node.name}.scales", column), [product, cast]
    factors = [] if fixed is not None else [scale]
    last, behind = node, only_user(node.outputs[0])
    if behind is not None and behind.op_type == "Mul" and FACTOR.read(behind):
        factors += [value for value in behind.inputs if value is not node.outputs[0]]
        last = behind
    for value in factors:
        nodes.append(ir.node("Mul", [factor, value]))
        factor = nodes[-1].outputs[0]
    nodes.append(ir.node("Mul", [cast.outputs[0], factor]))
    bias = stored(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], _column(graph, str(node.name), bias)]))
    for made in (product, cast, nodes[-1]):
        like(made.outputs[0], node.outputs[0])
    product.outputs[0].dtype = ir.DataType.INT32
    product.name, node.name = str(node.name), f"{node.name}.float"
    graph.insert_before(last, nodes)
    redirect(last.outputs[0], nodes[-1].outputs[0])


def _product(graph: ir.Graph, node: ir.Node, activation: ir.Node, weight: ir.Node) -> ir.Node:
    """The ConvInteger."""
    codes = stored(weight.inputs[0])
    assert codes is not None
    shape = tuple(codes.shape.numpy())

    def compute() -> npt.NDArray[np.generic]:
        moved: npt.NDArray[np.generic] = (codes.numpy().astype(np.int16) + UINT8.zero_point).astype(np.uint8)
        return moved

    unsigned = computed_initializer(graph, f"{node.name}.unsigned_codes", ir.DataType.UINT8, shape, compute)
    points = [
        initializer(graph, f"{node.name}.input_point", np.asarray(0, dtype=np.int8)),
        initializer(graph, f"{node.name}.weight_point", np.asarray(UINT8.zero_point, dtype=np.uint8)),
    ]
    return ir.node(
        "ConvInteger",
        [activation.inputs[0], unsigned, *points],
        attributes=dict(node.attributes),
        metadata_props=dict(node.metadata_props),
    )


def _column(graph: ir.Graph, name: str, bias: ir.TensorProtocol) -> ir.Value:
    """A bias [N] as [N, 1, 1], computed when it is read."""
    shape = (*bias.shape.numpy(), 1, 1)
    return computed_initializer(graph, f"{name}.added_bias", bias.dtype, shape, lambda: bias.numpy().reshape(shape))
