"""Turn quantized convolutions into ConvInteger, which ONNX Runtime's CPU kernels compute on codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.qtypes import UINT8

from ..base import (
    GraphPass,
    PassReport,
    computed_initializer,
    constant,
    initializer,
    like,
    redirect,
    reshaped_initializer,
    stored,
)
from ..match import only_user
from ..names import FACTOR

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class IntegerConvolutions(GraphPass):
    """Q(s, int8 0) -> DQ -> Conv(., DQ(w, v), b)  ->  Q(s, int8 0) -> ConvInteger(., w + 128, 0, 128) -> DQ(s v) -> + b.

    v[N] are the weight's scales. A scalar factor after the Conv, which factor_scale inserts for a table, is multiplied into the
    DequantizeLinear's scale. If the next node adds a vector [B, N, 1, 1] for each sample, such as a time embedding, the bias is
    added to that vector.

    ONNX Runtime fuses a Conv with its DequantizeLinears only if its result is quantized and so rounded, and never if its scale
    comes from a table. ConvInteger has kernels for four pairs of types. int8 activations with uint8 weights run on VNNI: 3.1 to
    3.7 times as fast as float for 3x3 kernels, 7 times for 1x1. Other pairs are as slow as a third of float's speed. Before 1.24
    only the pair uint8, uint8 has a kernel: see unsign_codes.

    It does not act where
        1. the activation's codes are not int8 with zero point 0, or the weight's codes are not int8 with a scale per output,
        2. the activation's scale is not one number for the whole tensor.

        Exactness: sums of products of codes are exact; the rest is rounded in float32.
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
    """Return the case in which the pass must not act; empty if it may act."""
    point, codes = constant(activation.inputs[2]) if len(activation.inputs) > 2 else None, stored(weight.inputs[0])
    if point is None or point.dtype != np.int8 or point.any():
        return "case 1: its input's codes are not int8 with the zero point 0"
    if codes is None or codes.dtype != ir.DataType.INT8 or weight.attributes.get_int("axis", 1) != 0:
        return "case 1: its weight's codes are not int8 with a scale for each output channel"
    scale = activation.inputs[1]
    if scale is None or scale.shape is None or len(scale.shape) > 0:
        return "case 2: its input has more than one scale"
    return ""


def _replace(graph: ir.Graph, node: ir.Node, activation: ir.Node, weight: ir.Node) -> None:
    """Replace a Conv, its scalar factor and its bias."""
    product = _product(graph, node, activation, weight)
    scales, scale = constant(weight.inputs[1]), activation.inputs[1]
    assert scales is not None
    fixed = constant(scale)
    common = np.float32(1) if fixed is None else fixed.astype(np.float32)
    row = (scales.reshape(-1).astype(np.float32) * common).astype(np.float32)
    factor, small = initializer(graph, f"{node.name}.scales", row), list[ir.Node]()
    user, last = only_user(node.outputs[0]), node
    values = [] if fixed is not None else [scale]
    if user is not None and user.op_type == "Mul" and FACTOR.read(user):
        values += [value for value in user.inputs if value is not node.outputs[0]]
        last = user
    numbers = [value for value in values if value is not None and value.shape is not None and len(value.shape) == 0]
    for value in numbers:
        small.append(ir.node("Mul", [factor, value]))
        factor = small[-1].outputs[0]
    # DequantizeLinear casts the int32 sums and multiplies them in one operator.
    large = [product, ir.node("DequantizeLinear", [product.outputs[0], factor], attributes={"axis": 1})]
    large += [ir.node("Mul", [large[-1].outputs[0], value]) for value in values if value not in numbers]
    bias = stored(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        column = reshaped_initializer(graph, f"{node.name}.added_bias", bias, (*bias.shape.numpy(), 1, 1))
        if not _join(graph, last.outputs[0], column):
            large.append(ir.node("Add", [large[-1].outputs[0], column]))
    for item in large:
        like(item.outputs[0], node.outputs[0])
    product.outputs[0].dtype = ir.DataType.INT32
    product.name, node.name = str(node.name), f"{node.name}.float"
    graph.insert_before(last, [*small, *large])
    redirect(last.outputs[0], large[-1].outputs[0])


def _join(graph: ir.Graph, result: ir.Value, bias: ir.Value) -> bool:
    """Add a bias [N, 1, 1] to the vector [B, N, 1, 1] that the next Add reads; return False if there is no such vector."""
    add = only_user(result)
    vector = (
        next((value for value in add.inputs if value is not result), None) if add is not None and add.op_type == "Add" else None
    )
    if add is None or vector is None or vector.shape is None:
        return False
    if tuple(vector.shape)[1:] != (bias.shape[0], 1, 1):  # type: ignore[index]
        return False
    joined = ir.node("Add", [vector, bias])
    like(joined.outputs[0], vector)
    graph.insert_before(add, joined)
    add.replace_input_with(list(add.inputs).index(vector), joined.outputs[0])
    return True


def _product(graph: ir.Graph, node: ir.Node, activation: ir.Node, weight: ir.Node) -> ir.Node:
    """Return the ConvInteger of a Conv. It computes the int32 sums of products of codes."""
    codes = stored(weight.inputs[0])
    assert codes is not None
    shape = tuple(codes.shape.numpy())

    def compute() -> npt.NDArray[np.generic]:
        shifted: npt.NDArray[np.generic] = (codes.numpy().astype(np.int16) + UINT8.zero_point).astype(np.uint8)
        return shifted

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
