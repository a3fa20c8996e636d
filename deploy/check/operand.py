"""What an operator reads through a DequantizeLinear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.passes.base import constant, stored

VIEWS = frozenset({"Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators through which a weight or an activation reaches a GEMM unchanged."""
UINT8 = ir.DataType.UINT8


@dataclass(frozen=True, kw_only=True)
class Operand:
    """What an operator reads through a DequantizeLinear.

    Args:
        dequantize: that node.
        quantize: the QuantizeLinear or DynamicQuantizeLinear before it, if the codes are not stored.
        source: the origin of the codes: an initializer, or the QuantizeLinear's input.
        before: views between the codes and the DequantizeLinear, the last first.
        after: views between the DequantizeLinear and the reader, the last first.
    """

    dequantize: ir.Node
    quantize: ir.Node | None
    source: ir.Value
    before: tuple[ir.Node, ...] = ()
    after: tuple[ir.Node, ...] = ()

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The DequantizeLinear and, if there is one, its QuantizeLinear."""
        return (self.dequantize,) if self.quantize is None else (self.dequantize, self.quantize)

    @property
    def stored(self) -> bool:
        """Whether the codes are an initializer."""
        return self.quantize is None and stored(self.source) is not None

    @property
    def dtype(self) -> ir.DataType | None:
        """The type of the codes: of the stored codes, of the QuantizeLinear's result, or of the zero point."""
        if self.quantize is None:
            tensor, zero = stored(self.source), _input(self.dequantize, 2)
            return tensor.dtype if tensor is not None else self.source.dtype or (zero.dtype if zero is not None else None)
        return codes_of(self.quantize)

    @property
    def scale(self) -> npt.NDArray[Any] | None:
        """The scale, if it is a constant."""
        return constant(_input(self.dequantize, 1))

    @property
    def scales(self) -> int | None:
        """The number of scales, also if they are computed at run time; None if the file does not tell."""
        value = _input(self.dequantize, 1)
        sizes = () if value is None else shape_of(value)
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    @property
    def float_type(self) -> ir.DataType | None:
        """The type of the DequantizeLinear's result."""
        data_type = attribute(self.dequantize, "output_dtype", 0)
        value = _input(self.dequantize, 1)
        return ir.DataType(data_type) if data_type else value.dtype if value is not None else None

    @property
    def spelled_axis(self) -> int:
        """The axis of the scales, as the node has it; it may count from the end."""
        return attribute(self.dequantize, "axis", 1)

    @property
    def axis(self) -> int:
        """The axis of the scales, counted from the front if the rank is known."""
        value = _input(self.dequantize, 0)
        rank = len(shape_of(value)) if value is not None else 0
        return self.spelled_axis % rank if rank else self.spelled_axis

    @property
    def blocked(self) -> bool:
        """Whether each scale belongs to a block."""
        value = _input(self.dequantize, 1)
        return value is not None and len(shape_of(value)) > 1

    @property
    def block_size(self) -> int:
        """The DequantizeLinear's block size; 0 without blocks."""
        return attribute(self.dequantize, "block_size", 0)

    def zero_points(self) -> list[npt.NDArray[Any] | None]:
        """The zero points of the DequantizeLinear and the QuantizeLinear; None for each that is missing or not constant."""
        return [constant(_input(node, 2)) for node in self.nodes if node.op_type != "DynamicQuantizeLinear"]

    def shifted(self) -> bool:
        """Whether a zero point is anything but 0."""
        if self.quantize is not None and self.quantize.op_type == "DynamicQuantizeLinear":
            return True
        return any(zero is not None and bool(zero.astype(np.float32).any()) for zero in self.zero_points())


def operand_of(value: ir.Value | None) -> Operand | None:
    """The DequantizeLinear that gives a value, through views; None if there is none."""
    value, after = _through_views(value)
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or not node.inputs:
        return None
    codes, before = _through_views(node.inputs[0])
    if codes is None:
        return None
    maker = codes.producer()
    if maker is not None and maker.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") and _input(maker, 0) is not None:
        source = maker.inputs[0]
        assert source is not None
        return Operand(dequantize=node, quantize=maker, source=source, before=before, after=after)
    return Operand(dequantize=node, quantize=None, source=codes, before=before, after=after)


def codes_of(quantize: ir.Node) -> ir.DataType:
    """The element type that a QuantizeLinear makes: its zero point's, its `output_dtype`, or uint8."""
    zero = _input(quantize, 2) if quantize.op_type == "QuantizeLinear" else None
    if zero is not None:
        tensor = stored(zero)
        return tensor.dtype if tensor is not None else zero.dtype or UINT8
    data_type = attribute(quantize, "output_dtype", 0)
    return ir.DataType(data_type) if data_type else UINT8


def attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute; `default` where it is missing or of another type."""
    entry = node.attributes.get(name)
    return entry.as_int() if entry is not None and entry.type == ir.AttributeType.INT and entry.value is not None else default


def shape_of(value: ir.Value) -> tuple[int | None, ...]:
    """A value's dimensions, with None for one that may change; empty for a scalar or an unknown shape."""
    tensor = stored(value)
    if tensor is not None:
        return tuple(int(dim) for dim in tensor.shape.numpy())
    if value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _through_views(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    passed = []
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in VIEWS and node.inputs and node.inputs[0] is not None:
        passed.append(node)
        value = node.inputs[0]
        node = value.producer()
    return value, tuple(passed)
