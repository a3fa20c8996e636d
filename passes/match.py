"""Questions that several passes ask of a graph."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .base import GraphError, constant, initializer, like, redirect

SCOPES = "pkg.torch.onnx.name_scopes"
ROOT = "transformer."


def module_of(node: ir.Node) -> str:
    """The torch module that a node was exported from, relative to the network; empty if unknown."""
    scopes = node.metadata_props.get(SCOPES)
    if not scopes:
        return ""
    parsed = ast.literal_eval(scopes)
    return str(parsed[-2]).removeprefix(ROOT) if len(parsed) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class LinearNode:
    """A linear layer in the graph: x @ W (+ bias), as MatMul + Add or as Gemm(transB=1).

    Args:
        name: module name.
        gemm: the MatMul or Gemm.
        bias_add: the Add behind a MatMul, or None.
    """

    name: str
    gemm: ir.Node
    bias_add: ir.Node | None

    @property
    def input(self) -> ir.Value:
        """What it reads."""
        value = self.gemm.inputs[0]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """Its result, bias included."""
        return (self.bias_add or self.gemm).outputs[0]

    def weight(self) -> npt.NDArray[np.float32]:
        """float32[out, in].

        Raises:
            GraphError: the weight is no float initializer (any more).
        """
        stored = constant(self.gemm.inputs[1])
        if stored is None or stored.dtype != np.float32:
            raise GraphError(f"'{self.name}': expected a float32 weight initializer, found {self.gemm.inputs[1]}")
        return (stored if self.gemm.op_type == "Gemm" else stored.T).astype(np.float32, copy=False)

    def bias(self) -> npt.NDArray[np.float32]:
        """float32[out]; zeros without a bias."""
        value = self._bias_value()
        stored = constant(value)
        if stored is None:
            return np.zeros(len(self.weight()), dtype=np.float32)
        return stored.astype(np.float32, copy=False)

    def set_weight(self, weight: npt.NDArray[np.floating]) -> None:
        """Store weight[out, in] as a new initializer; others may share the old one."""
        layout = weight if self.gemm.op_type == "Gemm" else weight.T
        made = initializer(_graph(self.gemm), f"{self.name}.weight", layout.astype(np.float32))
        self.gemm.replace_input_with(1, made)

    def set_bias(self, bias: npt.NDArray[np.floating]) -> None:
        """Store bias[out] as a new initializer, adding an Add where there was none."""
        graph = _graph(self.gemm)
        made = initializer(graph, f"{self.name}.bias", bias.astype(np.float32))
        if self.gemm.op_type == "Gemm":
            inputs = [*self.gemm.inputs[:2], made]
            self.gemm.resize_inputs(len(inputs))
            self.gemm.replace_input_with(2, made)
        elif self.bias_add is not None:
            index = next(i for i, value in enumerate(self.bias_add.inputs) if constant(value) is not None)
            self.bias_add.replace_input_with(index, made)
        elif bias.any():
            result = self.gemm.outputs[0]
            add = ir.node("Add", [result, made], metadata_props=dict(self.gemm.metadata_props))
            like(add.outputs[0], result)
            graph.insert_after(self.gemm, add)
            redirect(result, add.outputs[0])

    def _bias_value(self) -> ir.Value | None:
        if self.gemm.op_type == "Gemm":
            return self.gemm.inputs[2] if len(self.gemm.inputs) > 2 else None
        if self.bias_add is None:
            return None
        return next(value for value in self.bias_add.inputs if constant(value) is not None)


def linears(model: ir.Model) -> dict[str, LinearNode]:
    """Every linear of the graph by module name.

    Raises:
        GraphError: two GEMMs with a weight come from one module, or a Gemm has another form than x @ W^T + b.
    """
    found: dict[str, LinearNode] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or not _has_weight(node):
            continue
        name = module_of(node)
        if not name:
            continue
        if name in found:
            raise GraphError(f"two GEMMs come from module '{name}': '{found[name].gemm.name}' and '{node.name}'")
        if node.op_type == "Gemm" and not _plain_gemm(node):
            raise GraphError(f"Gemm '{node.name}' of '{name}': expected transA=0, transB=1, alpha=beta=1")
        found[name] = LinearNode(name=name, gemm=node, bias_add=_bias_add(node))
    return found


def find_linear(found: dict[str, LinearNode], name: str) -> LinearNode:
    """`found[name]`.

    Raises:
        GraphError: the graph has no such linear.
    """
    if name not in found:
        raise GraphError(f"the graph has no linear '{name}'; was it exported from another model?")
    return found[name]


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, or None if there are several, none, or it is a graph output."""
    users = {user for user, _ in value.uses()}
    return next(iter(users)) if len(users) == 1 and not value.is_graph_output() else None


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _has_weight(node: ir.Node) -> bool:
    weight = node.inputs[1]
    producer = weight.producer() if weight is not None else None
    if producer is not None:
        return producer.op_type == "DequantizeLinear" and constant(producer.inputs[0]) is not None
    return constant(weight) is not None


def _plain_gemm(node: ir.Node) -> bool:
    get = node.attributes.get_int
    floats = node.attributes.get_float
    return get("transA", 0) == 0 and get("transB", 0) == 1 and floats("alpha", 1.0) == 1.0 and floats("beta", 1.0) == 1.0


def _bias_add(node: ir.Node) -> ir.Node | None:
    if node.op_type == "Gemm":
        return None
    user = only_user(node.outputs[0])
    if user is not None and user.op_type == "Mul" and STAMP_FACTOR in user.metadata_props:
        user = only_user(user.outputs[0])
    if user is None or user.op_type != "Add" or module_of(user) != module_of(node):
        return None
    return user if any(constant(value) is not None for value in user.inputs) else None


STAMP_FACTOR = "dq_export.factor"
