"""What a GEMM reads through a DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.passes.base import constant, stored

VIEWS = ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a GEMM reads through a DequantizeLinear.

    Args:
        dequantize: that node.
        quantize: the QuantizeLinear before it, if the codes are not stored.
        source: what the codes are: an initializer, or what the QuantizeLinear reads.
    """

    dequantize: ir.Node
    quantize: ir.Node | None
    source: ir.Value

    @property
    def dtype(self) -> ir.DataType | None:
        """Of the codes."""
        value = self.dequantize.inputs[0]
        zero = self.dequantize.inputs[2] if len(self.dequantize.inputs) > 2 else None
        if self.quantize is not None and len(self.quantize.inputs) > 2 and self.quantize.inputs[2] is not None:
            zero = self.quantize.inputs[2]
        tensor = stored(zero) or stored(value)
        return tensor.dtype if tensor is not None else (zero.dtype if zero is not None else value.dtype if value else None)

    @property
    def scale(self) -> npt.NDArray[Any] | None:
        """The scale, if it is a constant."""
        return _folded(self.dequantize.inputs[1])

    @property
    def axis(self) -> int:
        """The axis that the scales lie along."""
        return self.dequantize.attributes.get_int("axis", 1)

    @property
    def blocked(self) -> bool:
        """Whether scales stand for blocks."""
        scale = self.scale
        return scale is not None and scale.ndim > 1


def chain_of(value: ir.Value | None) -> Chain | None:
    """The DequantizeLinear behind an operand, through views."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in VIEWS:
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    quantize = node.inputs[0].producer()
    if quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is not None:
        return Chain(dequantize=node, quantize=quantize, source=quantize.inputs[0])
    return Chain(dequantize=node, quantize=None, source=node.inputs[0])


def _folded(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The content of a constant, or of arithmetic on constants; None for what depends on an input."""
    content = constant(value)
    if content is not None or value is None:
        return content
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div", "Add", "Sub", "Constant", "Cast", "Reshape", "Squeeze"):
        return None
    if node.op_type == "Constant":
        tensor = node.attributes.get_tensor("value")
        return None if tensor is None else tensor.numpy()
    operands = [_folded(item) for item in node.inputs]
    if any(item is None for item in operands):
        return None
    a = operands[0]
    assert a is not None
    if node.op_type in ("Cast", "Reshape", "Squeeze"):
        return a
    b = operands[1]
    assert b is not None
    result: npt.NDArray[Any] = {"Mul": np.multiply, "Div": np.divide, "Add": np.add, "Sub": np.subtract}[node.op_type](a, b)
    return result


def shape_of(value: ir.Value) -> tuple[int | None, ...]:
    """Its dimensions, None for one that may change; empty where the shape is not known."""
    if value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)
