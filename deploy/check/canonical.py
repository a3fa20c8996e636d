"""One spelling for graphs that mean the same: no functions, Constants or Identities, and constants computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from dq_export.passes.base import constant, stored

from .operand import attribute

Array = npt.NDArray[Any]
SIZE = 1 << 20
"""The greatest size of a computed constant, in elements; scales of the blocks of the largest known linears have 300,000."""
BUDGET = 1 << 25
"""The greatest number of elements that are computed for one graph."""
ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "Mul": np.multiply,
    "Div": np.divide,
    "Add": np.add,
    "Sub": np.subtract,
}
FOLDED = frozenset({*ARITHMETIC, "Cast", "Reshape", "Squeeze", "Unsqueeze"})


class CanonicalError(Exception):
    """A graph that no runtime can order or expand; the message has one line."""


def canonical(model: ir.Model) -> ir.Model:
    """A copy of `model` in a form that is equal for equal graphs; stored tensors are shared with it.

    Calls of the model's functions become the functions' nodes, Constant nodes and casts of or arithmetic on constants
    become initializers, Identities disappear. Large tensors are not read.

    Raises:
        CanonicalError: nodes depend on each other in a circle, or stand before what they read.
    """
    try:
        copy = model.clone()
        if copy.functions:
            InlinePass()(copy)
    except (RuntimeError, ValueError) as error:  # the copy is made in the nodes' order
        raise CanonicalError(
            "nodes or functions that depend on each other in a circle, or stand before what they read"
        ) from error
    budget = BUDGET
    for graph in copy.graphs():
        for node in list(graph):
            if (source := _same(node)) is not None:
                _replace(node, source)
            elif (tensor := _computed(node, budget)) is not None:
                budget -= tensor.size if node.op_type in FOLDED else 0
                name = f"{node.outputs[0].name}.constant"
                value = ir.Value(
                    name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
                )
                graph.register_initializer(value)
                _replace(node, value)
    return copy


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Make every reader of a node's result read `value`; a graph output keeps its node."""
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, value)
    if node.graph is not None and not node.outputs[0].is_graph_output():
        node.graph.remove(node, safe=True)


def _same(node: ir.Node) -> ir.Value | None:
    """The input of an Identity, or of a Cast to the type that the input already has; None otherwise."""
    if node.op_type not in ("Identity", "Cast") or not node.inputs or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    same = node.op_type == "Identity" or (source.dtype is not None and attribute(node, "to", 0) == source.dtype.value)
    return source if same else None


def _computed(node: ir.Node, budget: int) -> ir.TensorProtocol | None:
    """The result of a node if it is a small constant or a cast of a constant; None otherwise."""
    if len(node.outputs) != 1:
        return None
    if node.op_type == "Constant":
        return _constant(node)
    if node.op_type not in FOLDED or not node.inputs:
        return None
    tensors = [stored(value) for value in node.inputs]
    if any(tensor is None for tensor in tensors):
        return None
    first = tensors[0]
    assert first is not None
    if node.op_type == "Cast":
        return _cast(first, node)
    sizes = [tensor.size for tensor in tensors if tensor is not None]
    if max(sizes) > SIZE or first.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
        return None
    arrays = [constant(value) for value in node.inputs]
    result = _arithmetic(node, arrays, min(SIZE, budget))
    return None if result is None else ir.tensor(np.ascontiguousarray(result).reshape(result.shape), dtype=first.dtype)


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node, from any of its attributes."""
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value is not None:
            return ir.tensor(np.asarray(attribute.value, dtype=dtype))
    attribute = node.attributes.get("value")
    return attribute.value if attribute is not None and isinstance(attribute.value, ir.TensorProtocol) else None


def _cast(tensor: ir.TensorProtocol, node: ir.Node) -> ir.TensorProtocol | None:
    """A tensor of another type. Large ones are computed when they are read: stored codes are cast, too, but never read."""
    dtype = ir.DataType(attribute(node, "to", 0))
    if dtype == ir.DataType.STRING or tensor.dtype == ir.DataType.STRING:
        return None
    shape = ir.Shape(tensor.shape.numpy())
    if tensor.size > SIZE:
        return ir.LazyTensor(lambda: ir.tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype), dtype, shape)
    return ir.tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)


def _arithmetic(node: ir.Node, arrays: list[Array | None], limit: int) -> Array | None:
    first, second = arrays[0], arrays[1] if len(arrays) > 1 else None
    if first is None or first.size > limit:
        return None
    try:
        if node.op_type in ARITHMETIC:
            if second is None or int(np.prod(np.broadcast_shapes(first.shape, second.shape))) > limit:
                return None
            with np.errstate(all="ignore"):
                return ARITHMETIC[node.op_type](first, second)
        if node.op_type == "Reshape":
            return None if second is None else first.reshape([int(size) or first.shape[i] for i, size in enumerate(second)])
        if node.op_type == "Squeeze":
            return first.squeeze() if second is None else first.squeeze(tuple(int(axis) for axis in second.reshape(-1)))
        return None if second is None else np.expand_dims(first, tuple(int(axis) for axis in second.reshape(-1)))
    except (ValueError, IndexError):  # shapes that do not fit: the runtime reports them
        return None
