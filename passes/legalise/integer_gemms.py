"""Products of codes with their bias, as ONNX Runtime's CPU provider fuses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..base import GraphPass, PassReport, constant, initializer, like, redirect
from ..match import LinearNode, linears

BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True, kw_only=True)
class IntegerGemms(GraphPass):
    """Q(s) -> DQ(s) -> MatMul(., DQ(w, v))  ->  Q(s) -> MatMulInteger(., w) -> Cast -> * (s v).

    v[N] are the weight's scales; a bias stays where it is. ONNX Runtime makes one kernel of all of it, bias included; from the
    form before it makes the same kernel, but adds the bias in a pass over the result of its own: 3 % of PixArt's operators in a
    profile, though within the noise of a whole call. It needs s * v as a node, and would compute that of two constants when it
    loads the graph. A constant s is therefore what code 1 stands for: a DequantizeLinear is the one operator that it never
    computes early.

    It does not act where
        1. the linear is no MatMul of two dequantized operands,
        2. the codes are not of 8 bits, or the activation has more scales than one, or the weight not one for each output,
        3. the graph computes in another type than float32: the kernel has no other.

    Exactness: the sums of products of codes are exact, and so is all up to their float32 rounding.
    Source: measured with ONNX Runtime 1.19 to 1.31; its MatMulIntegerToFloatFusion.
    """

    name: ClassVar[str] = "integer_gemms"
    # It takes the codes as they are then.
    after: ClassVar[tuple[str, ...]] = ("quantize_weights", "insert_qdq", "factor_scale", "clip_codes", "unsign_codes")
    before: ClassVar[tuple[str, ...]] = ("raise_biases",)

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        steps: dict[ir.Value, ir.Value] = {}
        for name, linear in linears(model).items():
            case = _refusal(linear)
            if case:
                skipped.append(f"'{name}': {case}")
                continue
            _replace(model.graph, linear, steps)
            changed.append(f"'{name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _refusal(linear: LinearNode) -> str:
    """The case in which the pass must not act on a linear; empty where it may."""
    activation, weight = (_dequantized(value) for value in linear.gemm.inputs[:2])
    if linear.gemm.op_type != "MatMul" or activation is None or weight is None:
        return "case 1: no MatMul of two dequantized operands"
    if linear.gemm.outputs[0].dtype != ir.DataType.FLOAT:
        return f"case 3: a result of type {linear.gemm.outputs[0].dtype}"
    codes, scales, _ = activation.inputs
    if _type(codes) not in BYTES or scales is None or scales.shape is None or len(scales.shape) > 0:
        return "case 2: an input whose codes are not of 8 bits, or that has more scales than one"
    codes, scales, _ = weight.inputs
    if _type(codes) not in BYTES or scales is None or scales.shape is None or len(scales.shape) != 1:
        return "case 2: a weight whose codes are not of 8 bits, or that has not one scale for each output"
    return ""


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear with a zero point that makes a value, or None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" and len(node.inputs) == 3 else None


def _type(codes: ir.Value | None) -> ir.DataType | None:
    return codes.dtype if codes is not None else None


def _replace(graph: ir.Graph, linear: LinearNode, steps: dict[ir.Value, ir.Value]) -> None:
    gemm, add = linear.gemm, linear.bias_add
    activation, weight = (_dequantized(value) for value in gemm.inputs[:2])
    assert activation is not None
    assert weight is not None
    scale = activation.inputs[1]
    assert scale is not None
    origin = dict(gemm.metadata_props)
    inputs = [activation.inputs[0], weight.inputs[0], activation.inputs[2], weight.inputs[2]]
    product = ir.node("MatMulInteger", inputs, metadata_props=origin)
    cast = ir.node("Cast", product.outputs, attributes={"to": ir.DataType.FLOAT.value}, metadata_props=origin)
    factor = ir.node("Mul", [_step(graph, scale, activation, steps), weight.inputs[1]], metadata_props=origin)
    result = ir.node("Mul", [cast.outputs[0], factor.outputs[0]], metadata_props=origin)
    for node in (product, cast, result):
        like(node.outputs[0], gemm.outputs[0])
    product.outputs[0].dtype = ir.DataType.INT32
    product.name, gemm.name = str(gemm.name), f"{gemm.name}.float"
    graph.insert_before(gemm, [product, cast, factor, result])
    redirect(gemm.outputs[0], result.outputs[0])
    if add is not None and add.inputs[1] is result.outputs[0]:  # ONNX Runtime looks for the bias at the second place
        first, second = add.inputs
        add.replace_input_with(0, second)
        add.replace_input_with(1, first)


def _step(graph: ir.Graph, scale: ir.Value, before: ir.Node, steps: dict[ir.Value, ir.Value]) -> ir.Value:
    """A scale that ONNX Runtime does not take for a constant."""
    if constant(scale) is None:
        return scale
    if scale not in steps:
        one, zero = (_code(graph, code) for code in (1, 0))
        node = ir.node("DequantizeLinear", [one, scale, zero], name=f"{scale.name}.step")
        like(node.outputs[0], scale)
        graph.insert_before(before, node)
        steps[scale] = node.outputs[0]
    return steps[scale]


def _code(graph: ir.Graph, code: int) -> ir.Value:
    """A code as a stored uint8, one for the whole graph."""
    name = f"code_{code}"
    return graph.initializers.get(name) or initializer(graph, name, np.asarray(code, dtype=np.uint8))
