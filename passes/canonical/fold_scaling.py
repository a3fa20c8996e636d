"""Fold the equivalent scaling of every site into the weights, norms and constants before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.folds import Float, read_bias, read_weight

from ..analysis.sites import GraphSite, Reader, graph_sites
from ..analysis.walk import Place
from ..base import GraphError, GraphPass, PassReport, computed_initializer, initializer, like, stored
from ..match import LinearNode, linears
from ..names import FOLDED

ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldScaling(GraphPass):
    """x -> W x + b  becomes  (x - m) / s -> (W diag(s)) x' + (b + W m), and (x - m) / s folds into the nodes that compute x.

    `graph_sites` finds the places, and `Part` holds the algebra. Rows of a linear or convolution: W /= s and
    b = (b - m) / s; likewise the gain and bias of a normalization, and stored operands. If no stored tensor can absorb it:
    Mul(v, 1 / s), and Add(-m / s) if there is a shift. A constant that the graph adds to a linear's rows, such as the "1 +"
    of adaLN, moves into its bias, with or without a scaling.

    It does not act where
        1. the plan has no scaling,
        2. the site was folded before (stamped on its first reader).

    Exactness: exact in real arithmetic; the float output changes by reordering only, by less than 1e-5 of its largest value.
    Source: SmoothQuant (arXiv 2211.10438) section 4 for the principle; modulation and value as in DiTAS (arXiv 2409.07756).

    Args:
        result: the calibration, whose sites are folded.
    """

    name: ClassVar[str] = "fold_scaling"
    # It changes float weights, and each linear only once.
    after: ClassVar[tuple[str, ...]] = ("fold_transpose", "merge_duplicates")
    before: ClassVar[tuple[str, ...]] = ("quantize_weights",)
    result: CalibrationResult

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        by_name = linears(model)
        sites = {item.site.name: item for item in graph_sites(model, convolutions=True)}
        for plan in self.result.sites.values():
            item = sites.get(plan.site.name)
            name = plan.site.name
            if item is None:
                raise GraphError(f"the graph has no input of '{name}'; was it exported from another model?")
            if not plan.scaled and not any(part.plus for part in plan.site.fold.parts):
                skipped.append(f"'{name}': nothing to scale (case 1)")
            elif FOLDED.read(item.readers[0].node):
                skipped.append(f"'{name}': folded before (case 2)")
            else:
                self._require_same(item, plan)
                for place in item.places:
                    _change(model.graph, by_name, place, plan)
                for reader in item.readers:
                    _undo(model.graph, by_name, reader, plan)
                FOLDED.write(item.readers[0].node, plan.method)
                changed.append(f"'{name}': {plan.method} into {plan.site.target}")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))

    def _require_same(self, item: GraphSite, plan: SitePlan) -> None:
        """Check that the graph has the same site as the calibration."""
        site, actual = plan.site, item.site
        same = (site.linears, site.shares, site.fold.of_kind("linear")) == (
            actual.linears,
            actual.shares,
            actual.fold.of_kind("linear"),
        )
        if not same or (site.shares and site.shares not in self.result.sites):
            raise GraphError(
                f"'{site.name}': expected its scaling to go into {plan.site.target}, found another place in the graph; "
                "calibrate again"
            )


def _undo(graph: ir.Graph, by_name: Mapping[str, LinearNode], reader: Reader, plan: SitePlan) -> None:
    """Make a reader of x read (x - m) / s."""
    if reader.node.op_type == "Conv":
        _replace(graph, reader.node, 1, f"{reader.name}.weight", lambda weight: read_weight(weight, plan.channel_scale))
        return
    in_scale, in_shift = plan.in_scale, plan.in_shift
    linear = by_name[reader.name]
    weight = linear.weight_reader()
    if in_shift.any():
        linear.change_bias(lambda bias: read_bias(bias, weight(), in_shift))
    linear.change_weight(lambda weight: read_weight(weight, in_scale))


def _change(graph: ir.Graph, by_name: Mapping[str, LinearNode], place: Place, plan: SitePlan) -> None:
    """Apply (x - m) / s at one place."""
    part, in_scale, in_shift = place.part, plan.channel_scale, plan.in_shift

    def divided(gain: Float) -> Float:
        return part.divided(gain, in_scale)

    def moved(bias: Float) -> Float:
        return part.moved(bias, in_scale, in_shift)

    if part.kind == "linear":
        by_name[part.name].change_weight(divided)
        by_name[part.name].change_bias(moved)
        if place.skip is not None:
            _skip(place.skip)
    elif part.kind in ("convolution", "norm"):
        node = place.value.producer()
        assert node is not None
        _replace(graph, node, 1, f"{part.name}.weight", divided)
        if len(node.inputs) > 2 or (part.shift and in_shift.any()):
            _replace(graph, node, 2, f"{part.name}.bias", moved)
    elif part.kind == "constant":
        _change_constant(graph, place, moved)
    else:
        _leave(graph, place, plan)


def _skip(add: ir.Node) -> None:
    source = next(value for value in add.inputs if stored(value) is None)
    for user, index in list(add.outputs[0].uses()):
        user.replace_input_with(index, source)


def _replace(graph: ir.Graph, node: ir.Node, index: int, name: str, change: Callable[[Float], Float]) -> None:
    """Make a node read `change` of a stored tensor, or of zeros if it has none; other nodes may share the old tensor."""
    before = stored(node.inputs[index]) if index < len(node.inputs) else None
    gain = stored(node.inputs[1])
    assert gain is not None
    shape = tuple((before or gain).shape.numpy()) if before is not None else (int(gain.shape.numpy()[0]),)

    def compute() -> Float32:
        content = np.zeros(shape) if before is None else before.numpy().astype(np.float64)
        return change(content).astype(np.float32)

    replacement = computed_initializer(graph, name, ir.DataType.FLOAT, shape, compute)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, replacement)


def _change_constant(graph: ir.Graph, place: Place, moved: Callable[[Float], Float]) -> None:
    """Store the changed constant operand, broadcast to all channels."""
    (node, index), axes = place.uses[0], place.axes
    before, result = stored(node.inputs[index]), node.outputs[0]
    assert before is not None
    shape = [int(dim) for dim in before.shape.numpy()]
    if node.op_type in ELEMENTWISE:
        assert result.shape is not None
        shape = [1] * (len(result.shape) - len(shape)) + shape
        for axis in axes:
            dim = result.shape[axis]
            assert isinstance(dim, int)
            shape[axis] = dim

    def compute() -> Float32:
        operand = np.broadcast_to(before.numpy().astype(np.float64), shape)
        others = [axis for axis in range(len(shape)) if axis not in axes]
        turned = operand.transpose(*others, *axes)
        changed = moved(turned.reshape(*turned.shape[: len(others)], -1)).reshape(turned.shape)
        back: Float32 = changed.transpose(np.argsort([*others, *axes])).astype(np.float32)
        return back

    replacement = computed_initializer(graph, f"{place.part.name}.operand", ir.DataType.FLOAT, tuple(shape), compute)
    node.replace_input_with(index, replacement)


def _leave(graph: ir.Graph, place: Place, plan: SitePlan) -> None:
    """Insert Mul(1 / s), and Add(-m / s) if there is a shift, after a value."""
    first, index = place.uses[0]
    source = first.inputs[index]
    assert source is not None
    assert source.shape is not None
    sizes = [1] * len(source.shape)
    for axis in place.axes:
        dim = source.shape[axis]
        assert isinstance(dim, int)
        sizes[axis] = dim
    shape = sizes[min(place.axes) :]
    channels = slice(*place.part.channels)
    inverse = (1.0 / plan.channel_scale[channels]).astype(np.float32)
    nodes = [ir.node("Mul", [source, initializer(graph, f"{plan.site.name}.inverse_in_scale", inverse.reshape(shape))])]
    if place.part.shift and plan.in_shift.any():
        offset = (-plan.in_shift[channels] * inverse).reshape(shape)
        added = initializer(graph, f"{plan.site.name}.scaled_in_shift", offset)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], added]))
    for node in nodes:
        like(node.outputs[0], source)
    graph.insert_before(first, nodes)
    for user, position in place.uses:
        user.replace_input_with(position, nodes[-1].outputs[0])
