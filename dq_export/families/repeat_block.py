"""Extend the graph of a network with three equal blocks to the graph of the same network with many."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dq_export.passes.base import stored
from dq_export.passes.match import SCOPES

SHARED = 65536
"""The greatest size, in bytes, of constants that are compared and shared if they are equal."""


def repeat_block(model: ir.Model, prefix: str, run: range, state: Mapping[str, Any]) -> bool:
    """x -> block 0 -> block 1 -> block 2 -> y  becomes  x -> ... -> block 2 -> ... -> the last block -> y, in place.

    Tracing takes time for every block, copying nodes takes almost none. Block 2 is the pattern: block n reads from
    block n - 1 what block 2 reads from block 1; parameters `<prefix>.2.*` become `<prefix>.n.*`; everything else is shared.
    (Block 0 is not a pattern, because it also has the nodes that the optimiser merged for all blocks.) Numbers count from the
    start of the run.

    It does not act if block 2 does not begin like block 1, node for node; then it returns False and does not change the
    graph. Further nodes at the end of block 2 belong to the part of the network after the last block.

    Exactness: the graph equals that of tracing all blocks, except for the names of nodes and values.

    Args:
        prefix: name of the list of blocks, as in `state` and in the nodes' scopes.
        run: the blocks' places in the list, of which the graph has the first three.
        state: torch parameters of all blocks of the run by name.
    """
    names = [f"{prefix}.{index}" for index in run[1:3]]
    first, pattern = (_nodes_of(model.graph, name) for name in names)
    pattern = pattern[: len(first)]
    successor = dict(zip(_outputs(first), _outputs(pattern), strict=False))
    if (
        not first
        or len(first) != len(pattern)
        or not all(_equal_nodes(a, b, successor, names) for a, b in zip(first, pattern, strict=True))
    ):
        return False
    inside = set(pattern)
    behind = [(value, use) for value in _outputs(pattern) for use in value.uses() if use[0] not in inside]
    copier = _Copier(graph=model.graph, prefix=prefix, pattern=run[2], state=state)
    current = {value: value for value in _outputs(pattern)}
    end = pattern[-1]
    for index in run[3:]:
        copies = {earlier: current[value] for earlier, value in successor.items()}
        nodes = [copier.copy(node, copies, index) for node in pattern]
        model.graph.insert_after(end, nodes)
        end = nodes[-1]
        current = {value: copies[value] for value in current}
    for value, (user, position) in behind:
        user.replace_input_with(position, current[value])
    return True


@dataclass(frozen=True, kw_only=True, eq=False)
class _Copier:
    """Copies the nodes of the block `pattern` for another block."""

    graph: ir.Graph
    prefix: str
    pattern: int
    state: Mapping[str, Any]

    def copy(self, node: ir.Node, copies: dict[ir.Value, ir.Value], index: int) -> ir.Node:
        """Copy one node; `copies` maps the pattern's values to this block's, and gets the new values."""
        inputs = [copies.get(value, self._parameter(value, index)) if value is not None else None for value in node.inputs]
        copied = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes=list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"{node.name}.{index}",
            metadata_props={key: self._renamed(text, index) for key, text in node.metadata_props.items()},
        )
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            new.name, new.shape, new.type = f"{old.name}.{index}", old.shape, old.type
            copies[old] = new
        return copied

    def _parameter(self, value: ir.Value, index: int) -> ir.Value:
        name, tensor = str(value.name), stored(value)
        if tensor is None or not name.startswith(f"{self.prefix}.{self.pattern}."):
            return value
        renamed = self._renamed(name, index)
        if renamed not in self.graph.initializers:
            content = self.state[renamed].numpy().reshape(tensor.shape.numpy())  # the graph may hold it with axes of 1 before it
            parameter = ir.Value(name=renamed, const_value=ir.tensor(content, name=renamed), shape=value.shape, type=value.type)
            self.graph.register_initializer(parameter)
        return self.graph.initializers[renamed]

    def _renamed(self, text: str, index: int) -> str:
        prefix = f"{re.escape(self.prefix)}|{re.escape(self.prefix.split('.', 1)[-1])}"
        return re.sub(rf"({prefix})\.{self.pattern}\b", rf"\g<1>.{index}", text)


def _nodes_of(graph: ir.Graph, module: str) -> list[ir.Node]:
    """The nodes from the module's first to its last, including nodes without a scope between them."""
    nodes = list(graph)
    inside = [i for i, node in enumerate(nodes) if re.search(rf"'{re.escape(module)}\b", node.metadata_props.get(SCOPES, ""))]
    return nodes[inside[0] : inside[-1] + 1] if inside else []


def _outputs(nodes: list[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _equal_nodes(first: ir.Node, second: ir.Node, successor: Mapping[ir.Value, ir.Value], names: Sequence[str]) -> bool:
    """Whether block 2's node is block 1's with block 2's parameters, reading what it reads one block later; `names`: theirs."""
    same = (first.domain, first.op_type, len(first.inputs), len(first.outputs)) == (
        second.domain,
        second.op_type,
        len(second.inputs),
        len(second.outputs),
    ) and {key: str(a) for key, a in first.attributes.items()} == {key: str(a) for key, a in second.attributes.items()}
    inside = set(successor.values())
    return same and all(_same_input(a, b, successor, inside, names) for a, b in zip(first.inputs, second.inputs, strict=True))


def _same_input(
    a: ir.Value | None, b: ir.Value | None, successor: Mapping[ir.Value, ir.Value], inside: set[ir.Value], names: Sequence[str]
) -> bool:
    if a is None or b is None or a is b:
        return a is b
    x, y = stored(a), stored(b)
    if x is not None and y is not None:
        if str(a.name).startswith(f"{names[0]}."):
            return str(b.name) == str(a.name).replace(f"{names[0]}.", f"{names[1]}.", 1)
        return x.dtype == y.dtype and x.nbytes == y.nbytes <= SHARED and x.tobytes() == y.tobytes()
    if a in successor or b in inside:
        return successor.get(a) is b
    # Block 1 reads this from block 0, block 2 from block 1: the stream through the blocks.
    return b in successor
