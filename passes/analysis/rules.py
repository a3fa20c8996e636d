"""How a scaling moves upstream through each operator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..base import constant, stored
from .axes import LAYOUT, before, dims, size
from .walk import FoldRule, Scaled, Walk, Way, cut_axis, place


def _layout(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    above = scaled.up(node.inputs[0], (node, 0), before(node, scaled.axes))
    return None if above is None else walk.best(above)


def _cut(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """A slice of tokens: the whole value takes the scaling, which the other slices' readers share. A slice of channels: rows."""
    axis = cut_axis(node)
    if axis is None:
        return None
    if axis in scaled.axes:
        return _rows(walk, scaled, node) if scaled.axes == (axis,) else None
    readers: set[ir.Node] = set()
    for output in node.outputs:
        for user, index in () if output is scaled.value else output.uses():
            behind = None if output.is_graph_output() else walk.behind(user, index, scaled.axes, scaled.span)
            if behind is None:
                return None
            readers |= behind
    above = scaled.up(node.inputs[0], (node, 0), scaled.axes)
    way = None if above is None else walk.best(above)
    return None if way is None else replace(way, readers=way.readers | readers)


def _rows(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """A chunk of a linear's result: the rows of the chunk, if no other reader uses them."""
    source, start = node.inputs[0], _start(node, scaled.value)
    linear = walk.linears.get(source) if source is not None else None
    if (
        linear is None
        or source is None
        or start is None
        or source.is_graph_output()
        or len(dims(source) or ()) - 1 not in scaled.axes
    ):
        return None
    stop = start + scaled.span[1] - scaled.span[0]
    for user, index in source.uses():
        if user is node:
            continue
        other = (
            _start(user, user.outputs[0]) if user.op_type == "Slice" and index == 0 and cut_axis(user) == scaled.axes[0] else None
        )
        if other is None or not (other >= stop or other + size(user.outputs[0], scaled.axes) <= start):
            return None
    return Way(places=(place("linear", linear.name, scaled, (start, stop)),))


def _start(node: ir.Node, output: ir.Value) -> int | None:
    """The first channel of an output of a Slice or Split in the value that is cut."""
    axis = cut_axis(node)
    if axis is None:
        return None
    if node.op_type == "Split":
        earlier = [size(other, (axis,)) for other in node.outputs[: list(node.outputs).index(output)]]
        return sum(earlier) if all(earlier) else None
    starts, steps = constant(node.inputs[1]), constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    if starts is None or steps is None or starts.size != 1 or int(steps.reshape(-1)[0]) != 1:
        return None
    start, whole = int(starts.reshape(-1)[0]), size(node.inputs[0], (axis,))
    return (start + whole if start < 0 else min(start, whole)) if whole else None


def _concat(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """Along channels, each input takes its share of the scaling; along tokens, all inputs take the same scaling."""
    rank = len(dims(scaled.value) or ())
    axis = node.attributes.get_int("axis", 0) % max(rank, 1)
    if axis in scaled.axes and scaled.axes != (axis,):
        return None
    ways, start = [], scaled.span[0]
    for index, value in enumerate(node.inputs):
        span = scaled.span
        if axis in scaled.axes:
            span = (start, start + size(value, (axis,)))
            start = span[1]
        above = scaled.up(value, (node, index), scaled.axes, span=span)
        way = walk.best(above) if above is not None and span[1] > span[0] else None
        if way is None:
            return None
        ways.append(way)
    return _joined(ways)


def _joined(ways: list[Way]) -> Way:
    places = tuple(place for way in ways for place in way.places)
    return Way(places=places, readers=frozenset().union(*(way.readers for way in ways)))


def _norm(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """A normalization's gain takes the scale, and its bias takes the shift."""
    rank = len(dims(scaled.value) or ())
    last = node.op_type == "LayerNormalization"
    if last and node.attributes.get_int("axis", -1) % max(rank, 1) != rank - 1:
        return None
    if scaled.value is not node.outputs[0] or scaled.axes != ((rank - 1,) if last else (1,)) or len(node.inputs) < 2:
        return None
    gain, bias = stored(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    if gain is None or (bias is not None and stored(bias) is None):
        return None
    return Way(places=(place("norm", str(scaled.value.name), scaled),))


def _operand(walk: Walk, scaled: Scaled, node: ir.Node, index: int, *, shift: bool) -> Way | None:
    """A way for one operand of an element-wise node; None if the operand does not have the channels."""
    value = node.inputs[index]
    shape, rank = dims(value), len(dims(scaled.value) or ())
    if value is None or shape is None:
        return None
    offset = rank - len(shape)
    axes = tuple(axis - offset for axis in scaled.axes)
    whole = replace(scaled, value=value, uses=((node, index),), shift=shift, depth=scaled.depth + 1)
    if stored(value) is not None:  # of any size: the pass stores it again with all channels
        return Way(places=(place("constant", str(node.outputs[0].name), whole),))
    return walk.best(replace(whole, axes=axes)) if min(axes) >= 0 else None


def _product(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """One factor takes the scale, and of a quotient the dividend; a product cannot take a shift."""
    if scaled.shift:
        return None
    indices = (0,) if node.op_type == "Div" else (0, 1)
    ways = [_operand(walk, scaled, node, index, shift=False) for index in indices]
    return min((way for way in ways if way is not None), key=lambda way: way.cost, default=None)


def _sum(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """Both operands take the scale, and one takes the shift; in a difference it is the first."""
    choices = (
        [(False, False)] if not scaled.shift else [(True, False)] if node.op_type == "Sub" else [(True, False), (False, True)]
    )
    ways_up = []
    for choice in choices:
        ways = [_operand(walk, scaled, node, index, shift=shift) for index, shift in enumerate(choice)]
        pair = [way for way in ways if way is not None]
        if len(pair) == 2:
            ways_up.append(_joined(pair))
            absorbed = _absorbed(node, scaled, pair) if node.op_type == "Add" else None
            ways_up += [absorbed] if absorbed is not None else []
    return min(ways_up, key=lambda way: way.cost, default=None)


def _absorbed(node: ir.Node, scaled: Scaled, pair: list[Way]) -> Way | None:
    """A constant that is added to rows of a linear, such as the "1 +" of adaLN, moves into the linear's bias.

    Dividing the constant by s separately would lose digits in low precision: 1 / s + (g - 1) / s.
    """
    for index in (0, 1):
        tensor, other = stored(node.inputs[index]), pair[1 - index].places
        if tensor is None or tensor.size != 1 or len(other) != 1 or other[0].part.kind != "linear" or other[0].part.plus:
            continue
        plus = float(tensor.numpy().reshape(()))
        part = replace(other[0].part, plus=plus, shift=scaled.shift)
        return replace(pair[1 - index], places=(replace(other[0], part=part, skip=node),))
    return None


def _attention(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """P V: the value V takes the scale, and the shift as well if the rows of P sum to 1."""
    left, right = (dims(value) for value in node.inputs)
    rank = len(dims(scaled.value) or ())
    if left is None or right is None or len(left) != rank or len(right) != rank or rank - 2 in scaled.axes:
        return None
    weights = node.inputs[0].producer() if node.inputs[0] is not None else None
    softmax = weights is not None and weights.op_type == "Softmax"
    if scaled.shift and not (softmax and weights is not None and weights.attributes.get_int("axis", -1) % rank == rank - 1):
        return None
    above = scaled.up(node.inputs[1], (node, 1), scaled.axes)
    return None if above is None or stored(above.value) is not None else walk.best(above)


RULES: dict[str, FoldRule] = {
    **dict.fromkeys(LAYOUT, _layout),
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "InstanceNormalization"), _norm),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("Slice", "Split"), _cut),
    "Concat": _concat,
    "MatMul": _attention,
}
"""For each operator, how a scaling moves through it."""
