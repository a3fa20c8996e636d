"""The runner holds every pass to the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from dq_export.passes.base import STAMP, GraphError, GraphPass, PassReport, initializer, run_passes


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
    made = [node for node in model.graph if STAMP in node.metadata_props]
    assert [node.op_type for node in made] == ["Identity"]
    assert made[0].metadata_props[STAMP] == "good"
    assert reports[0].changed == ("x",)


@pytest.mark.parametrize(
    ("bad", "message"),
    [(Restless(), "restless is not idempotent"), (Renamer(), "renamer changed the graph's"), (Dangler(), "dangler.*'nowhere'")],
)
def test_a_pass_that_breaks_the_contract_is_named(bad: GraphPass, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        run_passes(small(), [bad])


def test_it_can_stop_after_a_pass() -> None:
    assert [r.name for r in run_passes(small(), [Good(), Restless()], stop_after="good")] == ["good"]
    with pytest.raises(GraphError, match="no pass is called 'god'"):
        run_passes(small(), [Good()], stop_after="god")


def test_unused_initializers_are_removed() -> None:
    model = small()
    initializer(model.graph, "unused", np.zeros(3, dtype=np.float32))
    run_passes(model, [Good()])
    assert "unused" not in model.graph.initializers


def test_a_taken_initializer_name_gets_a_number() -> None:
    assert initializer(small().graph, "one", np.zeros(1, dtype=np.float32)).name == "one_1"
