"""The role of each linear, derived from the shape of its input and its place in the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from dq_export.core.network import Role

from ..match import LinearNode
from ..sizes import MEASURES
from .axes import dims


def roles(model: ir.Model, linears: Mapping[str, LinearNode], conditions: Collection[str] = ()) -> dict[str, Role]:
    """The role of every linear.

    `edge`: outside the lists of blocks, such as embedders and final projections; also embedders inside the blocks, whose
    results reach tokens only through other linears that work on one row per sample. `vector`: works on one row per sample.
    `static`: works only on tokens of the conditions, so that its result is constant along a trajectory. `gemm`: all others.

    Args:
        conditions: the graph inputs that do not change along a trajectory.
    """
    vectors = {name for name, linear in linears.items() if _is_vector(linear.input)}
    moving = _behind([value for value in model.graph.inputs if value.name not in conditions])
    gemms = {linear.gemm for linear in linears.values()}
    by_name: dict[str, Role] = {}
    for name, linear in linears.items():
        embeds = name in vectors and not _reaches_tokens(linear.output, gemms)
        if embeds or not any(part.isdigit() for part in name.split(".")):
            by_name[name] = "edge"
        elif name in vectors:
            by_name[name] = "vector"
        else:
            by_name[name] = "gemm" if linear.input in moving else "static"
    return by_name


def _is_vector(value: ir.Value) -> bool:
    shape = dims(value)
    return shape is not None and all(dim == 1 for dim in shape[1:-1])


def _behind(values: Collection[ir.Value]) -> set[ir.Value]:
    """All values that depend on the content of the given ones. Sizes do not count: they are constant along a trajectory."""
    dependent, todo = set(values), list(values)
    while todo:
        for node, _ in todo.pop().uses():
            new = [value for value in node.outputs if value not in dependent and node.op_type not in MEASURES]
            dependent.update(new)
            todo += new
    return dependent


def _reaches_tokens(value: ir.Value, gemms: Collection[ir.Node]) -> bool:
    """Whether a vector meets tokens, or leaves the graph, before another linear reads it."""
    visited, todo = {value}, [value]
    while todo:
        current = todo.pop()
        if current.is_graph_output() or not _is_vector(current):
            return True
        for node, _ in current.uses():
            new = [output for output in node.outputs if node not in gemms and output not in visited]
            visited.update(new)
            todo += new
    return False
