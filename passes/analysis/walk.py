"""The walk upstream from a value to what can take up its scaling.

y = (x - m) / s is pushed from x to its producer, and on, while nothing but the site reads the value. Each step keeps the
cheapest way; where there is none, the scaling stays there as a Mul and an Add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from dq_export.core.folds import FREE, Part

from ..base import constant, stored
from ..match import LinearNode
from .axes import LAYOUT, Axes, after, before, dims, size

Use = tuple[ir.Node, int]
Span = tuple[int, int]
DEPTH = 64
"""Nodes that a walk goes up at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A part of a fold, in the graph.

    Args:
        part: the part.
        value: the value that changes; of a linear its result.
        axes: the axes of `value` that hold the part's channels; of a constant, the axes of the result of the node that reads it.
        uses: the reads of `value` that are to see the change.
        skip: an Add of `part.plus`, which the part makes superfluous.
    """

    part: Part
    value: ir.Value
    axes: Axes
    uses: tuple[Use, ...]
    skip: ir.Node | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """One way to bring a scaling about.

    Args:
        places: where.
        readers: the GEMMs that read the same scaled elements behind other nodes, as the streams of joint attention do.
    """

    places: tuple[Place, ...]
    readers: frozenset[ir.Node] = frozenset()

    @property
    def cost(self) -> tuple[int, int, int, int]:
        """Channels scaled on tokens, then on vectors, then in norms and constants rather than in GEMMs; then parts."""
        sizes = dict.fromkeys(("token", "vector"), 0)
        for place in self.places:
            if place.part.kind not in FREE:
                sizes[place.part.kind] += place.part.channels[1] - place.part.channels[0]
        other = sum(place.part.kind in ("norm", "constant") for place in self.places)
        return (sizes["token"], sizes["vector"], other, len(self.places))


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled:
    """A value whose channels are to become (v - m) / s.

    Args:
        uses: the reads of it that are to see that.
        axes: which hold the channels.
        span: the site's channels that they are.
        shift: whether m is to be taken off as well.
        depth: nodes up to here.
    """

    value: ir.Value
    uses: tuple[Use, ...]
    axes: Axes
    span: Span
    shift: bool
    depth: int = 0

    def up(self, value: ir.Value | None, use: Use, axes: Axes | None, **changes: object) -> Scaled | None:
        """The same of a value that the producer reads."""
        if value is None or axes is None:
            return None
        return replace(self, value=value, uses=(use,), axes=axes, depth=self.depth + 1, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """A walk over one graph.

    Args:
        linears: by their results.
        convolutions: module names of convolutions with a stored weight, by their results.
        readers: width of every GEMM whose input can be scaled.
    """

    linears: Mapping[ir.Value, LinearNode]
    convolutions: Mapping[ir.Value, str]
    readers: Mapping[ir.Node, int]

    def best(self, scaled: Scaled) -> Way | None:
        """The cheapest way; None where the value's channels are not known."""
        width = scaled.span[1] - scaled.span[0]
        if stored(scaled.value) is not None:
            return self._constant(scaled)
        if size(scaled.value, scaled.axes) != width:
            return None
        stay = self.stay(scaled)
        through = self._through(scaled) if scaled.depth < DEPTH else None
        return stay if through is None or stay.cost <= through.cost else through

    @staticmethod
    def stay(scaled: Scaled) -> Way:
        """The scaling stays at the value itself."""
        shape = dims(scaled.value) or ()
        others = [dim for axis, dim in enumerate(shape) if axis > 0 and axis not in scaled.axes]
        kind = "vector" if shape and all(dim == 1 for dim in others) else "token"
        return Way(places=(_place(kind, str(scaled.value.name), scaled),))

    def _constant(self, scaled: Scaled) -> Way | None:
        (node, _), shape = scaled.uses[0], dims(scaled.value)
        known = shape is not None and all(isinstance(dim, int) for dim in shape)
        if not known or len(scaled.uses) > 1 or size(scaled.value, scaled.axes) != scaled.span[1] - scaled.span[0]:
            return None
        return Way(places=(_place("constant", str(node.outputs[0].name), scaled),))

    def _through(self, scaled: Scaled) -> Way | None:
        readers = self._other_readers(scaled)
        if readers is None:
            return None
        way = self._producer(scaled)
        return None if way is None else replace(way, readers=way.readers | readers)

    def _producer(self, scaled: Scaled) -> Way | None:
        value, rank = scaled.value, len(dims(scaled.value) or ())
        width = scaled.span[1] - scaled.span[0]
        if value in self.linears and scaled.axes == (rank - 1,) and self.linears[value].shape[0] == width:
            return Way(places=(_place("linear", self.linears[value].name, scaled),))
        if value in self.convolutions and scaled.axes == (1,):
            return Way(places=(_place("convolution", self.convolutions[value], scaled),))
        node = value.producer()
        rule = RULES.get(node.op_type) if node is not None and node.domain == "" else None
        return rule(self, scaled, node) if rule is not None and node is not None else None

    def _other_readers(self, scaled: Scaled) -> frozenset[ir.Node] | None:
        """The GEMMs behind all other reads of the value; None if one of those cannot undo the scaling."""
        if scaled.value.is_graph_output():
            return None
        found: set[ir.Node] = set()
        for node, index in scaled.value.uses():
            if (node, index) not in scaled.uses:
                behind = self.behind(node, index, scaled.axes, scaled.span)
                if behind is None:
                    return None
                found |= behind
        return frozenset(found)

    def behind(self, node: ir.Node, index: int, axes: Axes, span: Span) -> set[ir.Node] | None:
        """The GEMMs that read input `index` of a node, through layout and slices of tokens; None if anything else does."""
        value = node.inputs[index]
        shape = dims(value)
        if node in self.readers and index == 0 and shape is not None:
            return {node} if axes == (len(shape) - 1,) and span == (0, self.readers[node]) else None
        if index > 0 or node.op_type not in (*LAYOUT, "Slice", "Split"):
            return None
        if node.op_type in ("Slice", "Split"):
            cut = cut_axis(node)
            if cut is None or cut in axes:
                return None
        moved = after(node, axes) if node.op_type in LAYOUT else axes
        if moved is None:
            return None
        found: set[ir.Node] = set()
        for output in node.outputs:
            for user, place in output.uses():
                behind = None if output.is_graph_output() else self.behind(user, place, moved, span)
                if behind is None:
                    return None
                found |= behind
        return found


def _place(kind: str, name: str, scaled: Scaled, rows: Span | None = None) -> Place:
    width = scaled.span[1] - scaled.span[0]
    part = Part(kind=kind, name=name, rows=rows or (0, width), channels=scaled.span, shift=scaled.shift)  # type: ignore[arg-type]
    return Place(part=part, value=scaled.value, axes=scaled.axes, uses=scaled.uses)


def cut_axis(node: ir.Node) -> int | None:
    """The one axis that a Slice or Split cuts, from 0; None if it is not known or there are more."""
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    if node.op_type == "Split":
        return node.attributes.get_int("axis", 0) % len(shape)
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return int(axes.reshape(-1)[0]) % len(shape) if axes is not None and axes.size == 1 else None


def _layout(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    above = scaled.up(node.inputs[0], (node, 0), before(node, scaled.axes))
    return None if above is None else walk.best(above)


def _cut(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """A slice of tokens: the whole takes the scaling, as the other slices' readers share it. A slice of channels: rows."""
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
    """A chunk of a linear's result: those rows, while no other reader sees them."""
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
    return Way(places=(_place("linear", linear.name, scaled, (start, stop)),))


def _start(node: ir.Node, output: ir.Value) -> int | None:
    """Where an output of a Slice or Split of channels starts in what is cut."""
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
    """Along channels each input has its share; along tokens all have the same."""
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
    """A normalization's gain takes the scale, its bias the rest."""
    rank = len(dims(scaled.value) or ())
    last = node.op_type == "LayerNormalization"
    if last and node.attributes.get_int("axis", -1) % max(rank, 1) != rank - 1:
        return None
    if scaled.value is not node.outputs[0] or scaled.axes != ((rank - 1,) if last else (1,)) or len(node.inputs) < 2:
        return None
    gain, bias = stored(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    if gain is None or (bias is not None and stored(bias) is None):
        return None
    return Way(places=(_place("norm", str(scaled.value.name), scaled),))


def _operand(walk: Walk, scaled: Scaled, node: ir.Node, index: int, *, shift: bool) -> Way | None:
    """A way for one operand of an element-wise node; None where it has not got the channels."""
    value = node.inputs[index]
    shape, rank = dims(value), len(dims(scaled.value) or ())
    if value is None or shape is None:
        return None
    lost = rank - len(shape)
    axes = tuple(axis - lost for axis in scaled.axes)
    whole = replace(scaled, value=value, uses=((node, index),), shift=shift, depth=scaled.depth + 1)
    if stored(value) is not None:  # whatever its size: it is stored with all channels
        return Way(places=(_place("constant", str(node.outputs[0].name), whole),))
    return walk.best(replace(whole, axes=axes)) if min(axes) >= 0 else None


def _product(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """One factor takes the scale; none can take a shift. Of a quotient it is the dividend."""
    if scaled.shift:
        return None
    indices = (0,) if node.op_type == "Div" else (0, 1)
    ways = [_operand(walk, scaled, node, index, shift=False) for index in indices]
    return min((way for way in ways if way is not None), key=lambda way: way.cost, default=None)


def _sum(walk: Walk, scaled: Scaled, node: ir.Node) -> Way | None:
    """Both operands take the scale, one of them the shift: of a difference the first."""
    choices = (
        [(False, False)] if not scaled.shift else [(True, False)] if node.op_type == "Sub" else [(True, False), (False, True)]
    )
    found = []
    for choice in choices:
        ways = [_operand(walk, scaled, node, index, shift=shift) for index, shift in enumerate(choice)]
        pair = [way for way in ways if way is not None]
        if len(pair) == 2:
            found.append(_joined(pair))
            absorbed = _absorbed(node, scaled, pair) if node.op_type == "Add" else None
            found += [absorbed] if absorbed is not None else []
    return min(found, key=lambda way: way.cost, default=None)


def _absorbed(node: ir.Node, scaled: Scaled, pair: list[Way]) -> Way | None:
    """A number that is added to rows of a linear moves into its bias, as the "1 +" of adaLN does.

    Divided by s apart from them it would cancel in low precision: 1 / s + (g - 1) / s.
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
    """P V: the value takes it, the shift as well where the rows of P sum to 1."""
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


RULES: dict[str, Callable[[Walk, Scaled, ir.Node], Way | None]] = {
    **dict.fromkeys(LAYOUT, _layout),
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "InstanceNormalization"), _norm),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("Slice", "Split"), _cut),
    "Concat": _concat,
    "MatMul": _attention,
}
"""By operator: how a scaling passes it."""
