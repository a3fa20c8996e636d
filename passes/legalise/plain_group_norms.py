"""Express GroupNormalization with InstanceNormalization, for which ONNX Runtime has a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..base import GraphPass, PassReport, initializer, like, redirect, reshaped_initializer, stored


@dataclass(frozen=True, kw_only=True)
class PlainGroupNorms(GraphPass):
    """GroupNormalization(x, gain, bias)  ->  Reshape [B, groups, -1] -> InstanceNormalization -> Reshape -> * gain -> + bias.

    ONNX Runtime's CPU provider has no kernel for GroupNormalization, and expands it to 30 operators, seven of which read and
    write the whole image: 2.9 ms for 320 channels of 64 x 64 pixels, two samples and one thread. This form takes 1.5 ms.

    It does not act where
        1. gain and bias are not stored with one value for each channel,
        2. the element type is not float32, or the number of dimensions is unknown.

    Exactness: reorders float operations.
    Source: measured with ONNX Runtime 1.31.
    """

    name: ClassVar[str] = "plain_group_norms"
    # Pass fold_scaling changes gain and bias.
    after: ClassVar[tuple[str, ...]] = ("fold_scaling",)

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for node in [node for node in model.graph if node.op_type == "GroupNormalization"]:
            reason = _refusal(node)
            if reason:
                skipped.append(f"'{node.name}': {reason}")
                continue
            _replace(model.graph, node)
            changed.append(f"'{node.name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _refusal(node: ir.Node) -> str:
    """Return the case in which the pass must not act; empty if it may act."""
    x, gain, bias = node.inputs
    if x is None or x.shape is None or x.dtype != ir.DataType.FLOAT:
        return "case 2: not float32, or of an unknown number of dimensions"
    sizes = [tensor.shape.numpy() for value in (gain, bias) if (tensor := stored(value)) is not None]
    return "" if sizes == [(x.shape[1],)] * 2 else "case 1: no stored gain and bias for each channel"


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    x, groups, name = node.inputs[0], node.attributes.get_int("num_groups", 1), str(node.name)
    assert x is not None
    assert x.shape is not None
    split = initializer(graph, f"{name}.groups", np.asarray([0, groups, -1], dtype=np.int64))
    ones, zeros = (
        initializer(graph, f"{name}.{label}", np.full(groups, value, dtype=np.float32))
        for label, value in (("ones", 1), ("zeros", 0))
    )
    size = ir.node("Shape", [x])
    grouped = ir.node("Reshape", [x, split])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    normal = ir.node("InstanceNormalization", [grouped.outputs[0], ones, zeros], attributes={"epsilon": epsilon})
    image = ir.node("Reshape", [normal.outputs[0], size.outputs[0]])
    product = ir.node("Mul", [image.outputs[0], _column(graph, node, 1, "gain")])
    last = ir.node("Add", [product.outputs[0], _column(graph, node, 2, "bias")])
    for item in (grouped, normal):
        like(item.outputs[0], x)
        item.outputs[0].shape = ir.Shape([x.shape[0], groups, None])
    for item in (image, product, last):
        like(item.outputs[0], x)
    graph.insert_before(node, [size, grouped, normal, image, product, last])
    redirect(node.outputs[0], last.outputs[0])


def _column(graph: ir.Graph, node: ir.Node, index: int, label: str) -> ir.Value:
    """Return a gain or bias [C] as [C, 1, 1], computed when it is read."""
    tensor, x = stored(node.inputs[index]), node.inputs[0]
    assert tensor is not None
    assert x is not None
    assert x.shape is not None
    shape = (*tensor.shape.numpy(), *[1] * (len(x.shape) - 2))
    return reshaped_initializer(graph, f"{node.name}.{label}", tensor, shape)
