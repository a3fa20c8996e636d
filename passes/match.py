"""Linears, convolutions and other patterns that several passes look for in a graph."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.qtypes import QuantType

from .base import GraphError, computed_initializer, like, redirect, stored
from .names import FACTOR

SCOPES = "pkg.torch.onnx.name_scopes"
Float32 = npt.NDArray[np.float32]
ELEMENT_TYPES = {
    "int8": ir.DataType.INT8, "int6": ir.DataType.INT8, "uint8": ir.DataType.UINT8, "int4": ir.DataType.INT4,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
}  # fmt: skip


def module_of(node: ir.Node) -> str:
    """The torch module that a node was exported from, relative to the network and without the wrapper's prefix; empty if
    unknown."""
    return _last_module(node.metadata_props.get(SCOPES, "[]"))


@cache
def _last_module(scopes: str) -> str:
    parsed = ast.literal_eval(scopes)
    return str(parsed[-2]).partition(".")[2] if len(parsed) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class LinearNode:
    """A linear layer in the graph, x @ W (+ bias), as MatMul + Add or as Gemm(transB=1); or a convolution,
    whose weight [out, channels, height, width] is one of [out, in] for patches of its input.

    Args:
        name: module name.
        gemm: the MatMul, Gemm or Conv.
    """

    name: str
    gemm: ir.Node

    @property
    def bias_add(self) -> ir.Node | None:
        """The Add behind a MatMul, or None."""
        if self.gemm.op_type != "MatMul":
            return None
        user = only_user(self.gemm.outputs[0])
        if user is not None and user.op_type == "Mul" and FACTOR.read(user):
            user = only_user(user.outputs[0])
        if user is None or user.op_type != "Add" or module_of(user) != module_of(self.gemm):
            return None
        return user if any(stored(value) is not None for value in user.inputs) else None

    @property
    def input(self) -> ir.Value:
        """The value that it reads."""
        value = self.gemm.inputs[0]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """Its result, bias included."""
        return (self.bias_add or self.gemm).outputs[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        first, *others = self._weight_tensor().shape.numpy()
        second = math.prod(others)
        return (second, first) if self.gemm.op_type == "MatMul" else (first, second)

    def weight_reader(self) -> Callable[[], Float32]:
        """A function that returns the present weight, float32[out, in], even if the graph is rewritten later.

        Raises:
            GraphError: the weight is not (or no longer) a float initializer.
        """
        tensor, transposed = self._weight_tensor(), self.gemm.op_type == "MatMul"
        return lambda: tensor.numpy().T if transposed else tensor.numpy().reshape(len(tensor.numpy()), -1)

    def weight(self) -> Float32:
        """float32[out, in], computed now."""
        return self.weight_reader()()

    def bias_tensor(self) -> ir.TensorProtocol | None:
        """The stored bias, [out] or with leading ones, its content not computed yet; None without one."""
        if self.gemm.op_type != "MatMul":
            return stored(self.gemm.inputs[2]) if len(self.gemm.inputs) > 2 else None
        bias_add = self.bias_add
        return None if bias_add is None else next(tensor for value in bias_add.inputs if (tensor := stored(value)) is not None)

    def change_weight(self, change: Callable[[Float32], npt.NDArray[np.floating]]) -> None:
        """Replace the weight[out, in] by `change(weight)`, computed when it is read; other nodes may still read the old one."""
        reader, transposed = self.weight_reader(), self.gemm.op_type == "MatMul"
        shape = tuple(self._weight_tensor().shape.numpy())

        def compute() -> Float32:
            changed = change(reader()).astype(np.float32, copy=False)
            return changed.T if transposed else changed.reshape(shape)

        replacement = computed_initializer(_graph(self.gemm), f"{self.name}.weight", ir.DataType.FLOAT, shape, compute)
        self.gemm.replace_input_with(1, replacement)

    def change_bias(self, change: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.floating]]) -> None:
        """Replace the bias[out] by `change(bias)`, computed when it is read; inserts an Add if there was no bias."""
        graph, out, before = _graph(self.gemm), self.shape[0], self.bias_tensor()

        def compute() -> Float32:
            bias = np.zeros(out) if before is None else before.numpy().astype(np.float64)
            return change(bias).astype(np.float32)

        replacement = computed_initializer(graph, f"{self.name}.bias", ir.DataType.FLOAT, (out,), compute)
        bias_add = self.bias_add
        if self.gemm.op_type != "MatMul":
            self.gemm.resize_inputs(3)
            self.gemm.replace_input_with(2, replacement)
        elif bias_add is not None:
            index = next(i for i, value in enumerate(bias_add.inputs) if stored(value) is not None)
            bias_add.replace_input_with(index, replacement)
        else:
            result = self.gemm.outputs[0]
            add = ir.node("Add", [result, replacement], metadata_props=dict(self.gemm.metadata_props))
            like(add.outputs[0], result)
            graph.insert_after(self.gemm, add)
            redirect(result, add.outputs[0])

    def _weight_tensor(self) -> ir.TensorProtocol:
        tensor = stored(self.gemm.inputs[1])
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            raise GraphError(f"'{self.name}': expected a float32 weight initializer, found {self.gemm.inputs[1]}")
        return tensor


def linears(model: ir.Model) -> dict[str, LinearNode]:
    """Every linear of the graph and every convolution inside its blocks, by module name.

    Raises:
        GraphError: two GEMMs with a weight come from one module, or a Gemm has another form than x @ W^T + b.
    """
    by_name: dict[str, LinearNode] = {}
    for node in model.graph:
        name = module_of(node)
        if not name or node.op_type not in ("MatMul", "Gemm", "Conv") or not _has_weight(node):
            continue
        if node.op_type == "Conv" and not (any(part.isdigit() for part in name.split(".")) and _plain_convolution(node)):
            continue
        if name in by_name:
            raise GraphError(f"two GEMMs come from module '{name}': '{by_name[name].gemm.name}' and '{node.name}'")
        if node.op_type == "Gemm" and not _plain_gemm(node):
            raise GraphError(f"Gemm '{node.name}' of '{name}': expected transA=0, transB=1, alpha=beta=1")
        by_name[name] = LinearNode(name=name, gemm=node)
    return by_name


def convolutions(model: ir.Model) -> dict[ir.Node, str]:
    """Every convolution of the graph that came from a module, with the module's name."""
    return {node: name for node in model.graph if node.op_type == "Conv" and (name := module_of(node))}


def find_linear(by_name: Mapping[str, LinearNode], name: str) -> LinearNode:
    """Return `by_name[name]`.

    Raises:
        GraphError: the graph has no such linear.
    """
    if name not in by_name:
        raise GraphError(f"the graph has no linear '{name}'; was it exported from another model?")
    return by_name[name]


def element_type(qtype: QuantType) -> ir.DataType:
    """ONNX's element type for codes; activations of fewer bits than 8 are stored as int8.

    Raises:
        GraphError: a type without an element type in ONNX, or one that this table does not have yet.
    """
    if qtype.name not in ELEMENT_TYPES:
        raise GraphError(f"codes of type '{qtype.name}': expected one of {', '.join(ELEMENT_TYPES)}")
    return ELEMENT_TYPES[qtype.name]


def weight_codes(value: ir.Value | None) -> tuple[ir.TensorProtocol, ir.TensorProtocol | None] | None:
    """Stored codes, and the multipliers of a weight of two levels; None for a value that is computed in another way.

    Forms: the initializer itself; Cast of it; Reshape(Reshape(Cast(codes)) * multipliers).
    """
    tensor = stored(value)
    if tensor is not None:
        return tensor, None
    node, multiplier = value.producer() if value is not None else None, None
    while node is not None and node.op_type in ("Cast", "Reshape", "Mul"):
        if node.op_type == "Mul":
            multiplier = stored(node.inputs[1])
        tensor, source = stored(node.inputs[0]), node.inputs[0]
        if tensor is not None:
            return tensor, multiplier
        node = source.producer() if source is not None else None
    return None


def upstream(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The last of a chain of producers of these operators, each at the first input of the one before; None without them."""
    node = None
    for kind in kinds:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != kind:
            return None
        value = node.inputs[0]
    return node


def only_user(value: ir.Value) -> ir.Node | None:
    """The only node that reads a value; None if several nodes or no node read it, or if it is a graph output."""
    users = {user for user, _ in value.uses()}
    return next(iter(users)) if len(users) == 1 and not value.is_graph_output() else None


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _has_weight(node: ir.Node) -> bool:
    weight = node.inputs[1]
    producer = weight.producer() if weight is not None else None
    if producer is not None:
        return producer.op_type == "DequantizeLinear" and weight_codes(producer.inputs[0]) is not None
    return stored(weight) is not None


def _plain_convolution(node: ir.Node) -> bool:
    """Whether it is a 2-D convolution without groups."""
    weight = node.inputs[1]
    rank = len(weight.shape) if weight is not None and weight.shape is not None else 0
    return rank == 4 and node.attributes.get_int("group", 1) == 1


def _plain_gemm(node: ir.Node) -> bool:
    get = node.attributes.get_int
    floats = node.attributes.get_float
    return get("transA", 0) == 0 and get("transB", 0) == 1 and floats("alpha", 1.0) == 1.0 and floats("beta", 1.0) == 1.0
