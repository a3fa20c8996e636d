"""The contract of a pass, and the runner that checks it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from .names import PASS, PASSES


class GraphError(Exception):
    """A graph breaks a pass's or the runner's contract; the message names the pass and the node."""


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """What one pass did.

    Args:
        name: the pass.
        changed: one line for each place it rewrote.
        skipped: one line for each similar place that it left unchanged, with the reason.
    """

    name: str
    changed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


class GraphPass(ir.passes.InPlacePass):
    """One rewrite. Sub-classes are frozen dataclasses whose fields are the options and artifacts.

    A pass applies what calibration decided; it never chooses a number. `rewrite` must do nothing on a graph that it
    has already rewritten.

    `after` and `before` name passes that must not follow or precede this one in a list that has both.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def rewrite(self, model: ir.Model) -> PassReport:
        """Change `model` in place and report the changes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """onnx_ir's entry point."""
        return ir.passes.PassResult(model, modified=bool(self.rewrite(model).changed))


def check_order(passes: Sequence[GraphPass]) -> None:
    """Check that the order of a list of passes agrees with the declarations of each pass.

    Raises:
        GraphError: passes in a wrong order, or declarations that name no pass; all of them in one message.
    """
    place = {item.name: index for index, item in enumerate(passes)}
    wrong = []
    for item in passes:
        for name in (*item.after, *item.before):
            if name not in place and name not in PASSES:
                wrong.append(f"pass {item.name} declares its place by '{name}', but there is no pass of that name")
        index = place[item.name]
        wrong += [f"pass {item.name} must come after {name}" for name in item.after if place.get(name, index) > index]
        wrong += [f"pass {item.name} must come before {name}" for name in item.before if place.get(name, index) < index]
    if wrong:
        raise GraphError("; ".join(wrong) + f"; the list is {', '.join(place)}")


def run_passes(model: ir.Model, passes: Iterable[GraphPass]) -> list[PassReport]:
    """Apply passes in order and check the contract after each one.

    After each pass: the graph's inputs and outputs are unchanged, every value is produced, node names are unique, and
    a second application changes nothing. New nodes are stamped with the pass's name. Unused nodes and initializers are
    removed and the nodes sorted.

    Raises:
        GraphError: the order contradicts the declarations (raised before anything runs), or a pass broke the contract.
    """
    passes = list(passes)
    check_order(passes)
    reports = []
    interface = _interface(model)
    for item in passes:
        before = set(model.graph)
        report: object = item.rewrite(model)
        if not isinstance(report, PassReport):
            raise GraphError(f"pass {item.name} returned {type(report).__name__}; expected a PassReport")
        RemoveUnusedNodesPass()(model)
        TopologicalSortPass()(model)
        for node in model.graph:
            if node not in before:
                PASS.write(node, item.name)
        if _interface(model) != interface:
            raise GraphError(f"pass {item.name} changed the graph's inputs or outputs: {interface} -> {_interface(model)}")
        _check(model, item.name)
        second = item.rewrite(model)
        if second.changed:
            raise GraphError(f"pass {item.name} is not idempotent: a second run changed {second.changed[0]}")
        reports.append(report)
    return reports


def initializer(graph: ir.Graph, name: str, value: npt.NDArray[np.generic]) -> ir.Value:
    """Register a new initializer; if the name is in use, a number is appended.

    Args:
        value: its content; dtype and shape are kept.
    """
    return _register(graph, name, ir.tensor(np.ascontiguousarray(value).reshape(value.shape)))


def computed_initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], npt.NDArray[np.generic]]
) -> ir.Value:
    """Register a new initializer whose content is computed each time it is read, for the last time when the graph is saved.

    In this way a graph of any size is rewritten without a weight in memory, and saved with a few weights at a time.

    Args:
        compute: returns an array of `dtype` and `shape`; must not depend on anything that changes.
    """

    def tensor() -> ir.TensorProtocol:
        return ir.tensor(compute(), dtype=dtype)

    return _register(graph, name, ir.LazyTensor(tensor, dtype, ir.Shape(shape)))


def reshaped_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.Value:
    """Register a stored tensor in another shape, computed when it is read: it may be computed itself, from a whole weight."""
    return computed_initializer(graph, name, tensor.dtype, shape, lambda: tensor.numpy().reshape(shape))


def _register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    unique, number = name, 1
    while unique in graph.initializers:
        unique, number = f"{name}_{number}", number + 1
    tensor.name = unique
    value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def redirect(old: ir.Value, new: ir.Value) -> None:
    """Make every reader of `old` read `new`, except the node that produces `new`; a graph output keeps its name."""
    for user, index in list(old.uses()):
        if user is not new.producer():
            user.replace_input_with(index, new)
    producer = old.producer()
    graph = producer.graph if producer is not None else None
    if old.is_graph_output() and isinstance(graph, ir.Graph):
        graph.outputs[graph.outputs.index(old)] = new
        old.name, new.name = f"{old.name}_raw", old.name


def like(value: ir.Value, source: ir.Value) -> None:
    """Give a new value the shape and element type of another."""
    value.shape = source.shape
    if source.dtype is not None:
        value.dtype = source.dtype


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer, whose content may not be computed yet; None for other values."""
    return None if value is None or value.producer() is not None else value.const_value


def constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The content of an initializer; None for other values. For large tensors, which are computed lazily, use `stored`."""
    tensor = stored(value)
    content: npt.NDArray[np.generic] | None = None if tensor is None else tensor.numpy()
    return content


def _interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    return [(v.name, str(v.dtype), str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def _check(model: ir.Model, pass_name: str) -> None:
    values: set[ir.Value] = {*model.graph.inputs, *model.graph.initializers.values()}
    names: set[str] = set()
    wrong = []
    for node in model.graph:
        wrong += [
            f"node '{node.name}' reads '{v.name}', which nothing produces"
            for v in node.inputs
            if v is not None and v not in values
        ]
        values.update(node.outputs)
        if node.name in names:
            wrong.append(f"two nodes are called '{node.name}'")
        names.add(node.name or "")
    if wrong:
        raise GraphError(f"pass {pass_name} left a broken graph: " + "; ".join(wrong))
