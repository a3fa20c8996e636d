"""The runner holds every pass to the contract."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from dq_export.passes.base import GraphError, GraphPass, PassReport, initializer, run_passes
from dq_export.passes.names import PASS, PASSES


def small() -> ir.Model:
    """x + 1."""
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 21})
    one = initializer(graph, "one", np.asarray([1.0], dtype=np.float32))
    add = ir.node("Add", [x, one], name="add")
    add.outputs[0].name = "y"
    graph.append(add)
    graph.outputs.append(add.outputs[0])
    return ir.Model(graph, ir_version=10)


@dataclass(frozen=True, kw_only=True)
class Good(GraphPass):
    name: ClassVar[str] = "good"

    def rewrite(self, model: ir.Model) -> PassReport:
        add = next(node for node in model.graph if node.op_type == "Add")
        source = add.inputs[0]
        if source is None or source.producer() is not None:
            return PassReport(name=self.name)
        node = ir.node("Identity", [source])
        model.graph.insert_before(add, node)
        add.replace_input_with(0, node.outputs[0])
        return PassReport(name=self.name, changed=("x",))


@dataclass(frozen=True, kw_only=True)
class Restless(GraphPass):
    name: ClassVar[str] = "restless"

    def rewrite(self, model: ir.Model) -> PassReport:
        return PassReport(name=self.name, changed=("again",))


@dataclass(frozen=True, kw_only=True)
class Renamer(GraphPass):
    name: ClassVar[str] = "renamer"

    def rewrite(self, model: ir.Model) -> PassReport:
        model.graph.outputs[0].name = "z"
        return PassReport(name=self.name)


@dataclass(frozen=True, kw_only=True)
class Dangler(GraphPass):
    name: ClassVar[str] = "dangler"

    def rewrite(self, model: ir.Model) -> PassReport:
        next(iter(model.graph)).replace_input_with(1, ir.Value(name="nowhere"))
        return PassReport(name=self.name)


def test_new_nodes_are_stamped() -> None:
    model = small()
    reports = run_passes(model, [Good()])
    result = [node for node in model.graph if PASS.read(node)]
    assert [node.op_type for node in result] == ["Identity"]
    assert PASS.read(result[0]) == "good"
    assert reports[0].changed == ("x",)


@pytest.mark.parametrize(
    ("bad", "message"),
    [(Restless(), "restless is not idempotent"), (Renamer(), "renamer changed the graph's"), (Dangler(), "dangler.*'nowhere'")],
)
def test_a_pass_that_breaks_the_contract_is_named(bad: GraphPass, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        run_passes(small(), [bad])


def test_unused_initializers_are_removed() -> None:
    model = small()
    initializer(model.graph, "unused", np.zeros(3, dtype=np.float32))
    run_passes(model, [Good()])
    assert "unused" not in model.graph.initializers


def test_a_taken_initializer_name_gets_a_number() -> None:
    assert initializer(small().graph, "one", np.zeros(1, dtype=np.float32)).name == "one_1"


@dataclass(frozen=True, kw_only=True)
class Later(Good):
    name: ClassVar[str] = "later"
    after: ClassVar[tuple[str, ...]] = ("restless", "correct_bias")
    before: ClassVar[tuple[str, ...]] = ("renamer",)


@dataclass(frozen=True, kw_only=True)
class Patient(Good):
    name: ClassVar[str] = "patient"
    after: ClassVar[tuple[str, ...]] = ("correct_bias",)


@dataclass(frozen=True, kw_only=True)
class Misspelt(Good):
    name: ClassVar[str] = "misspelt"
    after: ClassVar[tuple[str, ...]] = ("correct_biases",)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((Later(), Restless()), "pass later must come after restless; the list is later, restless"),
        ((Renamer(), Later()), "pass later must come before renamer"),
        ((Misspelt(),), "pass misspelt declares its place by 'correct_biases', but there is no pass of that name"),
        ((Renamer(), Later(), Restless()), "after restless; pass later must come before renamer"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_runs(passes: tuple[GraphPass, ...], message: str) -> None:
    model = small()
    with pytest.raises(GraphError, match=message):
        run_passes(model, passes)
    assert [node.op_type for node in model.graph] == ["Add"]


def test_passes_that_are_not_in_the_list_ask_for_nothing() -> None:
    assert run_passes(small(), [Patient()])[0].changed == ("x",)


def test_every_pass_is_known_by_its_name() -> None:
    """The names that declarations may use are those of the classes, one a file that is called as the pass."""
    actual = []
    for folder in ("canonical", "legalise"):
        package = importlib.import_module(f"dq_export.passes.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            defined = [item for item in vars(loaded).values() if getattr(item, "__module__", "") == loaded.__name__]
            assert [item.name for item in defined if isinstance(item, type) and issubclass(item, GraphPass)] == [module.name]
            actual.append(module.name)
    assert sorted(actual) == list(PASSES)
