"""What a graph's file says of the sizes that may change."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from dq_export.core.network import Axis
from dq_export.passes.base import GraphError
from dq_export.passes.sizes import KEY, input_sizes, name_sizes, read_sizes, size_of, sizes_of, write_sizes

AXES = [Axis("height", 6, 24, 2), Axis("length", 5, 64)]


def graph_of(*inputs: tuple[str, list[int | str]]) -> ir.Model:
    values = [ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)) for name, shape in inputs]
    node = ir.node("Identity", [values[0]])
    node.outputs[0].shape = values[0].shape
    return ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21}), ir_version=10)


def test_a_multiple_is_called_by_its_axis_and_the_file_says_what_sizes_may_be() -> None:
    model = graph_of(("x", ["batch", 3, "2*height_by_2"]), ("text", ["batch", "length", 8]), ("timestep", [1]))
    name_sizes(model, AXES)
    write_sizes(model, AXES)
    assert str(model.graph.outputs[0].shape) == str(model.graph.inputs[0].shape) == "[batch,3,height]"
    second = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    assert read_sizes(second) == {axis.name: axis for axis in AXES}
    assert input_sizes(second) == {"x": (None, 3, AXES[0]), "text": (None, AXES[1], 8), "timestep": (1,)}


def test_a_part_of_an_axis_is_named_in_steps() -> None:
    axes = [Axis("height", 16, 48, 8), Axis("length", 5, 64)]
    texts: list[int | str] = ["batch", "8*height_by_8", "4*height_by_8", "height_by_8", "3*height_by_8", "2*length"]
    model = graph_of(("x", texts))
    name_sizes(model, axes)
    write_sizes(model, axes)
    parts = [Axis("height", 16, 48, 8, divisor) for divisor in (1, 2, 8)]
    assert input_sizes(model) == {"x": (None, *parts, None, None)}


def test_a_graph_whose_batch_alone_may_change_states_no_sizes() -> None:
    model = graph_of(("x", ["batch", 3, "?"]))
    write_sizes(model, [])
    assert (dict(model.metadata_props), read_sizes(model)) == ({}, {})
    assert input_sizes(model) == {"x": (None, 3, None)}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("batch", 1), ("height", 6), ("height_by_2", 3), ("2*height_by_2", 6), ("height_by_2*length", 15), ("length + 1", 6),
        ("4*batch*(length - 2)", 12), ("height//4", 1),
        ("other", 1), ("length**9", 1), ("__import__('os')", 1), ("length - 5", 1), ("height//0", 1), ("(", 1), ("1+" * 500, 1),
    ],
)  # fmt: skip
def test_a_dimensions_text_is_computed_for_one_picture(text: str, number: int) -> None:
    assert size_of(text, sizes_of({axis.name: axis for axis in AXES})) == number


@pytest.mark.parametrize(
    "text",
    [
        "{", "[1]", '{"height": 6}', '{"height": [6, 24]}', '{"height": [6, 24, 0]}', '{"height": [6, 24, 4]}',
        '{"height": [6, 5, 2]}', '{"height": [6, 1e9, 2]}', '{"height": [true, 24, 2]}', '{"height": [6, 1048577, 1]}',
        "[" * 9999,
    ],
)  # fmt: skip
def test_files_that_no_export_writes_are_refused(text: str) -> None:
    model = graph_of(("x", ["batch", 3]))
    model.metadata_props[KEY] = text
    with pytest.raises(GraphError, match=r"^the property dq_export\.sizes of the graph is damaged"):
        input_sizes(model)
