"""Products of codes written with DequantizeLinear and MatMul, as another exporter writes them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def use_qdq(model: ir.Model) -> None:
    """MatMulInteger -> Cast -> Mul(s v)  ->  DQ(s) -> MatMul(., DQ(v)); one DequantizeLinear for all that read the codes."""
    read: dict[ir.Value, ir.Node] = {}
    for product in [node for node in model.graph if node.op_type == "MatMulInteger"]:
        codes, weight, _, zero = product.inputs
        assert codes is not None
        quantize = codes.producer()
        assert quantize is not None
        result = _user(_user(product))
        factor = next(value.producer() for value in result.inputs[1:] if value is not None)
        assert factor is not None
        if codes not in read:
            read[codes] = ir.node("DequantizeLinear", [codes, *quantize.inputs[1:]], metadata_props=dict(quantize.metadata_props))
            model.graph.insert_after(quantize, read[codes])
        unit = ir.node("DequantizeLinear", [weight, factor.inputs[1], zero], attributes={"axis": 1})
        name, product.name = product.name, f"{product.name}.codes"
        matmul = ir.node("MatMul", [*read[codes].outputs, *unit.outputs], name=name, metadata_props=dict(product.metadata_props))
        matmul.outputs[0].dtype, matmul.outputs[0].shape = ir.DataType.FLOAT, result.outputs[0].shape
        model.graph.insert_before(result, [unit, matmul])
        for user, index in list(result.outputs[0].uses()):
            user.replace_input_with(index, matmul.outputs[0])
    RemoveUnusedNodesPass()(model)


def _user(node: ir.Node) -> ir.Node:
    return next(iter(node.outputs[0].uses()))[0]
