"""Sizes that an exported graph computes from a part, although an input has them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from conftest import run_onnx

from dq_export.families.known_sizes import use_known_sizes


def graph_of(factor: int, *, start: int = 1) -> ir.Model:
    """x [batch, 4*h], y [batch, h] -> x in rows of factor * (the length of y)."""
    x, y = (
        ir.Value(name=name, shape=ir.Shape(["batch", dim]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, dim in (("x", "4*h"), ("y", "h"))
    )
    constants = [
        ir.Value(name=name, const_value=ir.tensor(np.asarray(content, dtype=np.int64), name=name))
        for name, content in (("factor", factor), ("rest", [-1]), ("zero", [0]))
    ]
    shape = ir.node("Shape", [y], attributes={"start": start, "end": start + 1}, name="shape")
    size = ir.node("Squeeze", [shape.outputs[0]], name="squeeze")
    product = ir.node("Mul", [constants[0], size.outputs[0]], name="product")
    row = ir.node("Unsqueeze", [product.outputs[0], constants[2]], name="unsqueeze")
    sizes = ir.node("Concat", [constants[1], row.outputs[0]], attributes={"axis": 0}, name="concat")
    result = ir.node("Reshape", [x, sizes.outputs[0]], name="reshape")
    result.outputs[0].dtype = ir.DataType.FLOAT
    result.outputs[0].shape = ir.Shape([None, None])
    nodes = [shape, size, product, row, sizes, result]
    graph = ir.Graph([x, y], result.outputs, nodes=nodes, initializers=constants, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def feed(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(batch, 12)).astype(np.float32), "y": rng.normal(size=(batch, 3)).astype(np.float32)}


def test_a_multiple_is_read_from_the_input_that_has_it() -> None:
    model = graph_of(4)
    before = run_onnx(graph_of(4), feed(2))
    use_known_sizes(model)
    assert "Mul" not in [node.op_type for node in model.graph]
    assert "x" in [node.inputs[0].name for node in model.graph if node.op_type == "Shape" and node.inputs[0]]
    np.testing.assert_array_equal(run_onnx(model, feed(2)), before)


def test_other_products_stay() -> None:
    for model in (graph_of(2), graph_of(4, start=0)):
        use_known_sizes(model)
        assert [node.name for node in model.graph if node.op_type == "Mul"] == ["product"]
