"""The walk upstream from a value to the places that can absorb its scaling.

y = (x - m) / s is pushed from x to its producer, and further, as long as only the site reads the value. Each step keeps the
cheapest way; if there is none, the scaling stays there as a Mul and an Add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from dq_export.core.folds import FREE, Part

from ..base import constant, stored
from ..match import LinearNode
from .axes import LAYOUT, Axes, after, dims, size

Use = tuple[ir.Node, int]
Span = tuple[int, int]
DEPTH = 64
"""The greatest number of nodes that a walk goes up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A part of a fold, in the graph.

    Args:
        part: the part.
        value: the value that changes; for a linear, its result.
        axes: the axes of `value` that hold the part's channels; for a constant, the axes of the result of the node that reads it.
        uses: the reads of `value` that the change affects.
        skip: an Add of `part.plus`, which the part makes superfluous.
    """

    part: Part
    value: ir.Value
    axes: Axes
    uses: tuple[Use, ...]
    skip: ir.Node | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """One way to apply a scaling.

    Args:
        places: the values that change.
        readers: the GEMMs that read the same scaled elements through other nodes, as the streams of joint attention do.
    """

    places: tuple[Place, ...]
    readers: frozenset[ir.Node] = frozenset()

    @property
    def cost(self) -> tuple[int, int, int, int]:
        """Compared in this order: channels scaled on tokens, channels scaled on vectors, parts in norms and constants (not in
        GEMMs), all parts."""
        sizes = dict.fromkeys(("token", "vector"), 0)
        for place in self.places:
            if place.part.kind not in FREE:
                sizes[place.part.kind] += place.part.channels[1] - place.part.channels[0]
        other = sum(place.part.kind in ("norm", "constant") for place in self.places)
        return (sizes["token"], sizes["vector"], other, len(self.places))


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled:
    """A value v whose channels are to become (v - m) / s.

    Args:
        uses: the reads of it that the scaling affects.
        axes: the axes that hold the channels.
        span: the range of the site's channels that the value holds.
        shift: whether m is subtracted as well.
        depth: number of nodes from the site to here.
    """

    value: ir.Value
    uses: tuple[Use, ...]
    axes: Axes
    span: Span
    shift: bool
    depth: int = 0

    def up(self, value: ir.Value | None, use: Use, axes: Axes | None, **changes: object) -> Scaled | None:
        """The same scaling, of a value that the producer reads."""
        if value is None or axes is None:
            return None
        return replace(self, value=value, uses=(use,), axes=axes, depth=self.depth + 1, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """A walk over one graph.

    Args:
        linears: the linears, by their results.
        convolutions: module names of convolutions with a stored weight, by their results.
        readers: width of every GEMM whose input can be scaled.
        rules: for each operator, how a scaling moves through it.
    """

    linears: Mapping[ir.Value, LinearNode]
    convolutions: Mapping[ir.Value, str]
    readers: Mapping[ir.Node, int]
    rules: Mapping[str, FoldRule]

    def best(self, scaled: Scaled) -> Way | None:
        """The cheapest way; None if the value's channels are not known."""
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
        return Way(places=(place(kind, str(scaled.value.name), scaled),))

    def _constant(self, scaled: Scaled) -> Way | None:
        (node, _), shape = scaled.uses[0], dims(scaled.value)
        is_constant = shape is not None and all(isinstance(dim, int) for dim in shape)
        if not is_constant or len(scaled.uses) > 1 or size(scaled.value, scaled.axes) != scaled.span[1] - scaled.span[0]:
            return None
        return Way(places=(place("constant", str(node.outputs[0].name), scaled),))

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
            return Way(places=(place("linear", self.linears[value].name, scaled),))
        if value in self.convolutions and scaled.axes == (1,):
            return Way(places=(place("convolution", self.convolutions[value], scaled),))
        node = value.producer()
        rule = self.rules.get(node.op_type) if node is not None and node.domain == "" else None
        return rule(self, scaled, node) if rule is not None and node is not None else None

    def _other_readers(self, scaled: Scaled) -> frozenset[ir.Node] | None:
        """The GEMMs that all other reads of the value lead to; None if one of them cannot undo the scaling."""
        if scaled.value.is_graph_output():
            return None
        readers: set[ir.Node] = set()
        for node, index in scaled.value.uses():
            if (node, index) not in scaled.uses:
                behind = self.behind(node, index, scaled.axes, scaled.span)
                if behind is None:
                    return None
                readers |= behind
        return frozenset(readers)

    def behind(self, node: ir.Node, index: int, axes: Axes, span: Span) -> set[ir.Node] | None:
        """The GEMMs that read input `index` of a node through layout nodes and slices of tokens; None if another node reads
        it."""
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
        readers: set[ir.Node] = set()
        for output in node.outputs:
            for user, place in output.uses():
                behind = None if output.is_graph_output() else self.behind(user, place, moved, span)
                if behind is None:
                    return None
                readers |= behind
        return readers


def place(kind: str, name: str, scaled: Scaled, rows: Span | None = None) -> Place:
    """The place of a scaled value: the given rows of `name`, or all rows in order."""
    width = scaled.span[1] - scaled.span[0]
    part = Part(kind=kind, name=name, rows=rows or (0, width), channels=scaled.span, shift=scaled.shift)  # type: ignore[arg-type]
    return Place(part=part, value=scaled.value, axes=scaled.axes, uses=scaled.uses)


def cut_axis(node: ir.Node) -> int | None:
    """The axis that a Slice or Split cuts, counted from 0; None if it is unknown or not the only one."""
    shape = dims(node.inputs[0])
    if shape is None:
        return None
    if node.op_type == "Split":
        return node.attributes.get_int("axis", 0) % len(shape)
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return int(axes.reshape(-1)[0]) % len(shape) if axes is not None and axes.size == 1 else None


FoldRule = Callable[[Walk, Scaled, ir.Node], "Way | None"]
"""Maps the scaled result of a node to a way further upstream."""
