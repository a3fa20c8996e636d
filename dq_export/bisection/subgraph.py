"""The first linear whose result differs between two graphs, and the smallest part of the second that shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.network import output_name
from dq_export.deploy.backend import Feed, Float32
from dq_export.deploy.onnxruntime.cpu import open_graph
from dq_export.deploy.parity import difference
from dq_export.passes.match import LinearNode, linears, only_user
from dq_export.passes.names import FACTOR, PASS

TOGETHER = 32
"""Linears whose results are in memory at once."""
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Broken:
    """A linear whose result another graph does not give.

    Args:
        linear: its module name.
        expected: its result where it is right.
    """

    linear: str
    expected: Array


def first_broken(graphs: tuple[Path, Path], feed: Feed, limit: float, folded: CalibrationResult | None = None) -> Broken | None:
    """The first linear, as the graph runs, whose result in the second graph is below `limit` dB of the first's.

    Args:
        graphs: before and after a pass.
        feed: a network call.
        folded: the calibration, where the pass is the one that folds its scalings: producers then give scaled results.
    """
    before, after = (_results(ir.load(path)) for path in graphs)
    names = [name for name in after if name in before]
    for start in range(0, len(names), TOGETHER):
        part = names[start : start + TOGETHER]
        exact = values_of(graphs[0], [before[name] for name in part], feed)
        values = values_of(graphs[1], [after[name] for name in part], feed)
        for name in part:
            result = values[after[name]]
            expected = _folded(name, exact[before[name]].reshape(result.shape), folded)
            if difference(expected, result).sqnr < limit:
                return Broken(linear=name, expected=expected.astype(result.dtype))
    return None


def cut(graphs: tuple[Path, Path], broken: Broken, feed: Feed, limit: float, target: Path) -> tuple[list[Feed], list[Float32]]:
    """Write the smallest part of the second graph that does not give what a linear should, its result called `sample`.

    The parts that are tried: the linear's own nodes with its weight; with them all nodes that passes made on the way to its
    input; everything before it, which fails in any case. A part whose inputs are wrong already shows nothing.

    Args:
        feed: the call of the whole graph.

    Returns:
        The call of the part, and the result that it should give.
    """
    model, earlier = (ir.load(path) for path in reversed(graphs))
    linear, constants = linears(model)[broken.linear], _constants(model)
    result = _result(linear)
    ends = {linear.gemm, linear.bias_add, result.producer()}
    parts: tuple[Callable[[ir.Node], bool], ...] = (
        lambda node: node in ends,
        lambda node: node in ends or bool(PASS.read(node)),
        lambda node: True,
    )
    computed = {str(value.name) for node in earlier.graph for value in node.outputs} | set(feed)
    inputs: Feed = feed
    for inside in parts:
        names = _inputs(result, inside, constants)
        if not set(names) <= computed:
            continue
        right, actual = (values_of(path, names, feed) for path in graphs)
        if any(_differs(right[name], actual[name], limit) for name in names):
            continue
        inputs = {name: right[name].astype(actual[name].dtype) for name in names}
        _write_part(graphs[1], inputs, (str(result.name), broken.expected.dtype), target)
        (result_of_part,) = open_graph(target, optimize=False).session.run(None, dict(inputs))
        if difference(broken.expected, result_of_part).sqnr < limit:
            break
    return [inputs], [broken.expected.astype(np.float32)]


def _differs(right: Array, actual: Array, limit: float) -> bool:
    return right.shape != actual.shape or difference(right, actual).sqnr < limit


def values_of(graph: Path, names: Sequence[str], feed: Feed) -> dict[str, Array]:
    """By name the values that a network call has or computes."""
    inputs = {name: np.asarray(feed[name]) for name in names if name in feed}
    names = [name for name in names if name not in feed]
    if not names:
        return inputs
    model = ir.load(graph)
    by_name = {str(value.name): value for node in model.graph for value in node.outputs}
    model.graph.outputs[:] = [by_name[name] for name in names]
    exposed = graph.with_name("exposed.onnx")  # beside the weights that it refers to
    ir.save(model, exposed)
    session = open_graph(exposed, optimize=False, prepack=False).session
    return inputs | dict(zip(names, session.run(names, dict(feed)), strict=True))


def _results(model: ir.Model) -> dict[str, str]:
    """By linear, in the order of the graph, the name of its result, bias included."""
    return {name: str(_result(linear).name) for name, linear in linears(model).items()}


def _result(linear: LinearNode) -> ir.Value:
    user = only_user(linear.output)
    factored = linear.bias_add is None and user is not None and FACTOR.read(user)
    return user.outputs[0] if user is not None and factored else linear.output


def _folded(name: str, result: Array, calibration: CalibrationResult | None) -> Array:
    """What a linear gives once the scalings are folded."""
    for plan in calibration.sites.values() if calibration else ():
        for part in plan.site.fold.rows_of(name):
            result = part.moved(result, plan.channel_scale, plan.in_shift)
    return result


def _constants(model: ir.Model) -> set[ir.Value]:
    """Initializers, and what is computed from them alone."""
    constants = set(model.graph.initializers.values())
    for node in model.graph:
        if all(value is None or value in constants for value in node.inputs):
            constants.update(node.outputs)
    return constants


def _inputs(result: ir.Value, inside: Callable[[ir.Node], bool], constants: set[ir.Value]) -> list[str]:
    """Names of the values that the nodes `inside` need to compute a result, beside constants."""
    inputs: dict[str, None] = {}
    queue, visited = [result], {result} | constants
    while queue:
        node = queue.pop().producer()
        assert node is not None
        for value in (item for item in node.inputs if item is not None and item not in visited):
            visited.add(value)
            producer = value.producer()
            if producer is None or not inside(producer):
                inputs[str(value.name)] = None
            else:
                queue.append(value)
    return list(inputs)


def _write_part(graph: Path, inputs: Feed, result: tuple[str, np.dtype[Any]], target: Path) -> None:
    """Cut out what computes a result, of this name and type, from `inputs`."""
    import onnx
    import onnx_graphsurgeon

    whole = onnx_graphsurgeon.import_onnx(onnx.load(graph))
    tensors = whole.tensors()
    for name, value in inputs.items():
        tensors[name].inputs.clear()
        # The batch stays open where it is: ONNX Runtime rewrites linears of a fixed batch, and fails on broken ones.
        if tensors[name].shape is None or len(tensors[name].shape) != value.ndim:
            tensors[name].shape = value.shape
        tensors[name].dtype = value.dtype
    whole.inputs = [tensors[name] for name in inputs]
    output = tensors[result[0]]
    output.dtype = result[1]
    whole.outputs = [output]
    whole.cleanup(remove_unused_graph_inputs=True).toposort()
    output.name = output_name(inputs)
    onnx.save(onnx_graphsurgeon.export_onnx(whole), target)
