"""The sites of a float graph: the values that linears read, and the places that absorb the scaling of each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import onnx_ir as ir

from dq_export.core.folds import Fold
from dq_export.core.network import InputSite, Linear

from ..base import stored
from ..canonical.fold_transpose import FoldTranspose
from ..match import LinearNode, convolutions, linears
from .axes import dims
from .bounds import terms
from .roles import roles
from .rules import RULES
from .walk import Place, Scaled, Walk, Way


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A GEMM or a convolution that reads a site.

    Args:
        name: its module.
        node: the MatMul, Gemm or Conv; input 0 is the site's value.
        width: number of channels that it reads.
        axis: the axis of its input that holds the channels.
    """

    name: str
    node: ir.Node
    width: int
    axis: int


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphSite:
    """A site with its places in the graph."""

    site: InputSite
    readers: tuple[Reader, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """The linears, sites and attentions of an exported float network.

    Args:
        linears: by module name, in execution order.
        sites: inputs of the linears whose role is `gemm` or `static`, in execution order.
        attention: the linears whose results bound the query, key and value of each attention. A query or key that is
            normalized head by head needs none.
    """

    linears: dict[str, Linear]
    sites: tuple[InputSite, ...]
    attention: tuple[tuple[str, ...], ...]


def structure(model: ir.Model, conditions: Collection[str] = ()) -> Structure:
    """The structure of a float graph. The graph is not changed, and no weight is read.

    Args:
        conditions: the graph inputs that do not change along a trajectory.

    Raises:
        GraphError: see `linears`.
    """
    model = model.clone()
    FoldTranspose().rewrite(model)
    by_name = linears(model)
    role = roles(model, by_name, conditions)
    sites = (item.site for item in graph_sites(model, convolutions=True))
    usable = [site for site in sites if any(role.get(name) in ("gemm", "static") for name in site.linears)]
    described = {
        name: Linear(name=name, role=role[name], width=linear.shape[1], convolution=linear.gemm.op_type == "Conv")
        for name, linear in by_name.items()
    }
    return Structure(linears=described, sites=tuple(usable), attention=_attention(model, by_name))


def graph_sites(model: ir.Model, *, convolutions: bool = False) -> list[GraphSite]:
    """Every value that linears read, in execution order, and the places that absorb its scaling.

    If several sites are slices of one value, such as the streams of joint attention, the first has the fold, and the others
    share its scaling.

    Args:
        model: after fold_transpose.
        convolutions: whether to include the inputs of convolutions, which take no shift: it would be wrong at a padded border.
    """
    by_name = {
        name: linear
        for name, linear in linears(model).items()
        if stored(linear.gemm.inputs[1]) is not None and linear.gemm.op_type != "Conv"
    }
    kernels = _convolutions(model)
    readers = [Reader(name=n, node=g.gemm, width=g.shape[1], axis=-1) for n, g in by_name.items()]
    if convolutions:
        readers += [Reader(name=n, node=v.producer(), width=_inputs(v), axis=1) for v, n in kernels.items() if _inputs(v)]  # type: ignore[arg-type]
        order = {node: i for i, node in enumerate(model.graph)}
        readers.sort(key=lambda reader: order[reader.node])
    by_value: dict[tuple[ir.Value, object], list[Reader]] = {}
    for reader in readers:
        value = reader.node.inputs[0]
        assert value is not None
        by_value.setdefault((value, _patches(reader.node)), []).append(reader)
    walk = Walk(
        linears={linear.output: linear for linear in by_name.values()},
        convolutions=kernels,
        readers={linear.gemm: linear.shape[1] for linear in by_name.values()},
        rules=RULES,
    )
    return _sites(walk, by_value)


def _sites(walk: Walk, by_value: dict[tuple[ir.Value, object], list[Reader]]) -> list[GraphSite]:
    leaders: dict[ir.Node, str] = {}
    result: list[GraphSite] = []
    for (value, _), group in by_value.items():
        name, nodes = group[0].name, {reader.node for reader in group}
        leader = leaders.get(group[0].node, "")
        if leader:
            site = InputSite(name=name, linears=_names(group), fold=Fold(parts=()), shares=leader)
            result.append(GraphSite(site=site, readers=tuple(group), places=()))
            continue
        way, shifts = _cheapest(walk, value, group)
        partners = {reader.node for item in result for reader in item.readers} & way.readers
        if partners:  # other sites already scale these GEMMs separately
            way, shifts = _alone(walk, value, group), True
        leaders |= dict.fromkeys(way.readers - nodes, name)
        fold = Fold(parts=tuple(place.part for place in way.places), shifts=shifts)
        result.append(
            GraphSite(site=InputSite(name=name, linears=_names(group), fold=fold), readers=tuple(group), places=way.places)
        )
    return result


def _names(group: list[Reader]) -> tuple[str, ...]:
    return tuple(reader.name for reader in group)


def _cheapest(walk: Walk, value: ir.Value, group: list[Reader]) -> tuple[Way, bool]:
    """The cheapest way, and whether it takes a shift. In a tie, a way with a shift wins."""
    scaled = _scaled(value, group)
    ways = []
    for shift in (False,) if group[0].axis == 1 else (True, False):
        way = walk.best(replace(scaled, shift=shift))
        if way is not None:
            ways.append((way, shift))
    if not ways:
        return _alone(walk, value, group), group[0].axis != 1
    return min(ways, key=lambda pair: pair[0].cost[:2])


def _alone(walk: Walk, value: ir.Value, group: list[Reader]) -> Way:
    return walk.stay(_scaled(value, group))


def _scaled(value: ir.Value, group: list[Reader]) -> Scaled:
    rank = len(dims(value) or ()) or 3
    axis = group[0].axis % rank
    uses = tuple((reader.node, 0) for reader in group)
    return Scaled(value=value, uses=uses, axes=(axis,), span=(0, group[0].width), shift=group[0].axis != 1)


def _patches(node: ir.Node) -> object:
    """A key that is equal for convolutions that read the same patches of a value."""
    if node.op_type != "Conv" or node.inputs[1] is None or node.inputs[1].shape is None:
        return ()
    ints = {name: tuple(node.attributes.get_ints(name, ())) for name in ("strides", "pads", "dilations")}
    return (tuple(node.inputs[1].shape.numpy()[2:]), *ints.values())


def _convolutions(model: ir.Model) -> dict[ir.Value, str]:
    return {node.outputs[0]: name for node, name in convolutions(model).items() if stored(node.inputs[1]) is not None}


def _inputs(value: ir.Value) -> int:
    """The number of channels that a convolution reads; 0 if it has groups."""
    node = value.producer()
    assert node is not None
    tensor = stored(node.inputs[1])
    assert tensor is not None
    return 0 if node.attributes.get_int("group", 1) != 1 else int(tensor.shape.numpy()[1])


def _attention(model: ir.Model, by_name: dict[str, LinearNode]) -> tuple[tuple[str, ...], ...]:
    by_output = {linear.output: name for name, linear in by_name.items()}
    groups = []
    for node in model.graph:
        scores = node.inputs[0].producer() if node.op_type == "Softmax" and node.inputs[0] is not None else None
        products = [user for user, index in node.outputs[0].uses() if user.op_type == "MatMul" and index == 0]
        if scores is None or scores.op_type != "MatMul" or len(products) != 1:
            continue
        names = [_projections(value, by_output) for value in (*scores.inputs, products[0].inputs[1])]
        if None not in names:
            groups.append(tuple(dict.fromkeys(name for part in names for name in part or ())))
    return tuple(groups)


def _projections(value: ir.Value | None, by_output: dict[ir.Value, str]) -> list[str] | None:
    """The linears whose results bound a value, in order; None if other values do, too."""
    if value is None or stored(value) is not None:
        return None if value is None else []
    if value in by_output:
        return [by_output[value]]
    node = value.producer()
    inputs = terms(node) if node is not None else None
    if inputs is None:
        return None
    parts = [_projections(item, by_output) for item in inputs]
    return None if None in parts else [name for part in parts for name in part or ()]
