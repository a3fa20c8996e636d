"""Remove the padding of texts, which masked attention does not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..base import GraphPass, PassReport, constant, initializer, like
from ..match import only_user

HIDDEN = -1000.0
"""A bias of scores. At this value or below, a softmax in float32 gives exactly 0."""
BY_TOKEN = frozenset({
    "Abs", "Add", "Cast", "Clip", "DequantizeLinear", "Div", "Gelu", "MatMul", "Max", "Mul", "QuantizeLinear", "Reshape",
    "Round", "Sigmoid", "Sub", "Tanh", "Transpose",
})  # fmt: skip
"""Operators that compute each token from the same token: MatMul by a weight, and layouts, which move whole tokens."""
LAYOUT = frozenset({"Unsqueeze", "Expand", "Reshape", "Concat", "Cast"})


@dataclass(frozen=True, kw_only=True)
class TrimText(GraphPass):
    """text [B, L, D], mask [B, L]  ->  both sliced after the graph's inputs to the longest text of the batch.

    Pipelines pad every prompt to the greatest length, 300 tokens for PixArt, and a mask hides the padding from attention.
    Keys, values and scores of the padding take an eighth of the time of a call at 512 pixels.

    A text whose mask has no 1 keeps its length, because its softmax is over the padding.

    It does not act where
        1. no two inputs [B, L] and [B, L, ..] share a size L that may change,
        2. the mask has another use than `(1 - mask) * c` with c <= -1000, added to scores before a softmax,
        3. the text has another use than token by token in keys and values of attention with that mask.

        Exactness: a masked token's weight in the softmax is exactly 0, so only sums of zeros are left out. Masks hold 0 and 1.
    """

    name: ClassVar[str] = "trim_text"

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for mask, text in _pairs(model.graph):
            reason = _refusal(mask, text)
            if reason:
                skipped.append(f"'{text.name}': {reason}")
                continue
            _trim(model.graph, mask, text)
            changed.append(f"'{text.name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _pairs(graph: ir.Graph) -> list[tuple[ir.Value, ir.Value]]:
    """Return the pairs of inputs that may be a mask and its text (case 1)."""
    inputs = [(value, list(value.shape)) for value in graph.inputs if value.shape is not None]
    return [
        (mask, text)
        for mask, short in inputs
        for text, long in inputs
        if len(short) == 2 and len(long) == 3 and isinstance(short[1], ir.SymbolicDim) and short == long[:2]
    ]


def _refusal(mask: ir.Value, text: ir.Value) -> str:
    """Return the reason why a text is not trimmed; empty if it is."""
    hidden = _masked_softmaxes(mask)
    return _stray(text, hidden) if hidden else "its mask is not a bias of scores before a softmax (case 2)"


def _masked_softmaxes(mask: ir.Value) -> set[ir.Node]:
    """Return the softmaxes whose scores the mask biases; empty if the mask has any other use."""
    softmaxes: set[ir.Node] = set()
    for node, _ in mask.uses():
        if node.op_type == "Shape":
            continue
        scaled = only_user(node.outputs[0]) if node.op_type == "Sub" and _is_one(node.inputs[0]) else None
        factors = [constant(value) for value in scaled.inputs] if scaled is not None and scaled.op_type == "Mul" else []
        bias = next((float(factor.item()) for factor in factors if factor is not None and factor.size == 1), 0.0)
        if scaled is None or bias > HIDDEN or not _collect(scaled.outputs[0], softmaxes):
            return set()
    return softmaxes


def _is_one(value: ir.Value | None) -> bool:
    content = constant(value)
    return content is not None and content.size == 1 and float(content.item()) == 1.0


def _collect(bias: ir.Value, softmaxes: set[ir.Node]) -> bool:
    """Add to `softmaxes` those that a bias reaches; return False if it reaches another node."""
    for node, _ in bias.uses():
        if node.op_type == "Shape":
            continue
        if node.op_type == "Add":
            user = only_user(node.outputs[0])
            if user is None or user.op_type != "Softmax" or user.attributes.get_int("axis", -1) not in (-1, 3):
                return False
            softmaxes.add(user)
        elif node.op_type not in LAYOUT or not _collect(node.outputs[0], softmaxes):
            return False
    return True


def _stray(text: ir.Value, hidden: set[ir.Node]) -> str:
    """Return the first use of the text outside keys and values of masked attention (case 3); empty if there is none."""
    values, queue = {text}, [text]
    while queue:
        for node, place in queue.pop().uses():
            if node.op_type == "Shape":
                continue
            if node.op_type == "MatMul" and place == 1:
                if not (_is_key(node, hidden) or _is_value(node, hidden)):
                    return f"'{node.name}' mixes its tokens without the mask (case 3)"
                continue
            if not _by_token(node):
                return f"'{node.name}', a {node.op_type}, may mix its tokens (case 3)"
            new = set(node.outputs) - values
            values |= new
            queue.extend(new)
    return ""


def _by_token(node: ir.Node) -> bool:
    """Whether each token of the result comes from the same token."""
    if node.op_type == "ReduceMax":  # the maximum for a scale of each token
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return axes is not None and axes.reshape(-1).tolist() == [-1]
    return node.op_type in BY_TOKEN


def _is_key(product: ir.Node, hidden: set[ir.Node]) -> bool:
    """Whether a product computes scores of masked attention."""
    user = only_user(product.outputs[0])
    while user is not None and user.op_type in ("Mul", "Add"):
        user = only_user(user.outputs[0])
    return user in hidden


def _is_value(product: ir.Node, hidden: set[ir.Node]) -> bool:
    """Whether a product sums values by the weights of masked attention."""
    weights = product.inputs[0]
    return weights is not None and weights.producer() in hidden


def _trim(graph: ir.Graph, mask: ir.Value, text: ir.Value) -> None:
    """Slice mask and text after the last token that any text's mask keeps."""
    readers = [(value, list(value.uses())) for value in (mask, text)]
    name = f"{text.name}.trimmed"
    zero, one, first, axis = (
        initializer(graph, f"{name}.{label}", np.asarray(number, dtype=np.int64))
        for label, number in (("zero", 0), ("one", 1), ("first", [0]), ("axis", [1]))
    )
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, name=f"{name}.{len(nodes)}")
        nodes.append(node)
        return node.outputs[0]

    size = add("Gather", add("Shape", mask), one, axis=0)
    places = add("Range", one, add("Add", size, one), one)
    positions = add("Mul", add("Cast", add("Cast", mask, to=ir.DataType.BOOL), to=ir.DataType.INT64), places)
    last = add("ReduceMax", positions, axis, keepdims=0)
    longest = add("ReduceMax", add("Where", add("Equal", last, zero), size, last), first, keepdims=1)
    for value, uses in readers:
        sliced = add("Slice", value, first, longest, axis)
        like(sliced, value)
        for user, index in uses:
            user.replace_input_with(index, sliced)
    graph.insert_before(graph[0], nodes)
