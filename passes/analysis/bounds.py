"""Upper bounds of the values between linears and attention's products."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..base import stored
from ..match import upstream

SAME = frozenset({"Cast", "Expand", "Identity", "Neg", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose results are elements of their first input, up to the sign."""


def terms(node: ir.Node) -> list[ir.Value | None] | None:
    """The inputs whose bounds bound a node's results; None for an operator without a rule here."""
    if node.op_type in SAME:
        return [node.inputs[0]]
    if node.op_type in ("Cos", "Sin") or normalized(node):
        return []
    return list(node.inputs) if node.op_type in ("Add", "Concat", "Mul", "Sub") else None


def normalized(node: ir.Node) -> int:
    """Of x / sqrt(mean(x^2) + epsilon) along the last axis, the number of elements that the mean is over; 0 for other nodes."""
    if node.op_type != "Mul":
        return 0
    for x, factor in (node.inputs, reversed(node.inputs)):
        mean = upstream(factor, "Reciprocal", "Sqrt", "Add", "ReduceMean")
        square = mean.inputs[0].producer() if mean is not None and mean.inputs[0] is not None else None
        if square is None or x is None or square.inputs[0] is not x or x.shape is None or mean is None:
            continue
        if square.op_type != "Pow" or _scalar(square.inputs[1]) != 2 or len(mean.inputs) < 2:
            continue
        if _scalar(mean.inputs[1]) not in (-1, len(x.shape) - 1):
            continue
        size = x.shape[-1]
        return size if isinstance(size, int) else 0
    return 0


def bound(value: ir.Value | None, linears: Mapping[ir.Value, float]) -> float | None:
    """A number that no |element| of a value exceeds; None if the graph does not tell one.

    A normalized vector of d elements has the length sqrt(d) at the most, so no element exceeds that; a rotation adds two
    products with a cosine and a sine.

    Args:
        linears: the same for the results of linears.
    """
    if value is None:
        return None
    if value in linears:
        return linears[value]
    constant = stored(value)
    if constant is not None:
        return float(np.abs(constant.numpy().astype(np.float64)).max(initial=0.0))
    node = value.producer()
    inputs = terms(node) if node is not None else None
    if node is None or inputs is None:
        return None
    if not inputs:
        return math.sqrt(normalized(node) or 1)
    bounds = [bound(item, linears) for item in inputs]
    numbers = [number for number in bounds if number is not None]
    if len(numbers) < len(bounds):
        return None
    if node.op_type == "Mul":
        return math.prod(numbers)
    return sum(numbers) if node.op_type in ("Add", "Sub") else max(numbers)


def _scalar(value: ir.Value | None) -> float | None:
    tensor = stored(value) if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
