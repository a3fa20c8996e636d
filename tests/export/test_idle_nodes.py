"""Nodes that change nothing leave the graph, and those that change something stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx

from dq_export.families.idle_nodes import drop_idle

LAST = 2**63 - 1


def rejoined(cut: int = 2, second: int = 2, axis: int = 1, joined: int = 1, step: int = 1, swap: bool = False) -> ir.Model:
    """x[B, 5, 4] -> Concat(x[:, :cut], x[:, second:]) -> Relu."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 5, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    numbers: dict[int, ir.Value] = {}

    def number(value: int) -> ir.Value:
        if value not in numbers:
            content = ir.tensor(np.asarray([value]), name=f"n{value}")
            numbers[value] = ir.Value(
                name=f"n{value}", const_value=content, shape=ir.Shape([1]), type=ir.TensorType(content.dtype)
            )
        return numbers[value]

    front = ir.node("Slice", [x, number(0), number(cut), number(axis), number(1)], name="front")
    back = ir.node("Slice", [x, number(second), number(LAST), number(axis), number(step)], name="back")
    parts = [node.outputs[0] for node in ((back, front) if swap else (front, back))]
    whole = ir.node("Concat", parts, attributes={"axis": joined}, name="whole")
    whole.outputs[0].shape = ir.Shape(["batch", 5, 4])
    end = ir.node("Relu", [whole.outputs[0]], name="end")
    end.outputs[0].name = "y"
    end.outputs[0].shape, end.outputs[0].dtype = ir.Shape(["batch", None, None]), ir.DataType.FLOAT
    graph = ir.Graph(
        [x], end.outputs, nodes=[front, back, whole, end], initializers=list(numbers.values()), opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def test_a_cut_whose_parts_are_joined_again_is_removed() -> None:
    model = rejoined()
    drop_idle(model)
    assert [node.op_type for node in model.graph] == ["Relu"]
    feed = {"x": np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)}
    np.testing.assert_array_equal(run_onnx(model, feed), run_onnx(rejoined(), feed))


@pytest.mark.parametrize(
    "changes", [{"second": 3}, {"swap": True}, {"joined": 2, "axis": 1, "second": 3}, {"step": 2}, {"axis": 2, "joined": 1}]
)
def test_a_cut_that_changes_something_stays(changes: dict[str, int]) -> None:
    model = rejoined(**changes)
    drop_idle(model)
    assert len(list(model.graph)) == 4


def test_a_part_that_others_read_stays() -> None:
    model = rejoined()
    front = next(node for node in model.graph if node.name == "front")
    more = ir.node("Relu", [front.outputs[0]], name="more")
    more.outputs[0].name = "z"
    more.outputs[0].shape, more.outputs[0].dtype = ir.Shape(["batch", 2, 4]), ir.DataType.FLOAT
    model.graph.append(more)
    model.graph.outputs.append(more.outputs[0])
    drop_idle(model)
    assert sorted(str(node.name) for node in model.graph) == ["end", "front", "more"]
