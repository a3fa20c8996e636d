"""The role of each linear, by the shape of its input and its place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import Builder

from dq_export.passes.analysis.sites import structure


def network() -> ir.Model:
    """A block whose modulation reads an embedding of c, and whose keys read the text alone."""
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), c=(ir.DataType.FLOAT, ["B", 4]), text=(ir.DataType.FLOAT, ["B", 5, 8]))
    axis = b.const("axis", np.asarray([1]))
    embedded = b.node("Gemm", b.value["c"], b.weight("w1", 8, 4), module="blocks.0.norm.emb.linear_1", transB=1)
    modulation = b.node("Gemm", b.node("Sigmoid", embedded), b.weight("w2", 8, 8), module="blocks.0.norm.linear", transB=1)
    x = b.node("MatMul", b.value["x"], b.weight("w3", 8, 8), module="embed")
    x = b.node("Mul", x, b.node("Unsqueeze", modulation, axis))
    query = b.node("MatMul", x, b.node("Transpose", b.weight("w4", 8, 8), perm=[1, 0]), module="blocks.0.to_q")
    key = b.node("MatMul", b.value["text"], b.weight("w5", 8, 8), module="blocks.0.to_k")
    scores = b.node("MatMul", query, b.node("Transpose", key, perm=[0, 2, 1]))
    return b.shaped(b.node("Softmax", scores, axis=-1, shape=["B", 3, 5]))


@pytest.mark.parametrize(("conditions", "text"), [((), "gemm"), (("text",), "static")])
def test_roles_follow_from_shape_and_place(conditions: tuple[str, ...], text: str) -> None:
    result = structure(network(), conditions)
    assert {name: linear.role for name, linear in result.linears.items()} == {
        "blocks.0.norm.emb.linear_1": "edge",
        "blocks.0.norm.linear": "vector",
        "embed": "edge",
        "blocks.0.to_q": "gemm",
        "blocks.0.to_k": text,
    }
    assert [site.name for site in result.sites] == ["blocks.0.to_q", "blocks.0.to_k"]


def test_a_text_that_is_laid_out_by_the_states_sizes_is_static() -> None:
    """As PixArt's, which is reshaped to the batch of the state."""
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]), text=(ir.DataType.FLOAT, ["B", 5, 8]))
    batch = b.node("Shape", b.value["x"], start=0, end=1, shape=[1])
    batch.dtype = ir.DataType.INT64
    sizes = b.node("Concat", batch, b.const("rest", np.asarray([5, 8])), axis=0)
    sizes.dtype = ir.DataType.INT64
    text = b.node("Reshape", b.value["text"], sizes, shape=["B", 5, 8])
    key = b.node("MatMul", text, b.weight("w5", 8, 8), module="blocks.0.to_k")
    query = b.node("MatMul", b.value["x"], b.weight("w4", 8, 8), module="blocks.0.to_q")
    model = b.shaped(b.node("MatMul", query, b.node("Transpose", key, perm=[0, 2, 1])))
    assert {name: linear.role for name, linear in structure(model, ("text",)).linears.items()} == {
        "blocks.0.to_k": "static",
        "blocks.0.to_q": "gemm",
    }


def test_the_graph_stays_as_it_is() -> None:
    model = network()
    before = ir.serde.serialize_model(model).SerializeToString()
    structure(model)
    assert ir.serde.serialize_model(model).SerializeToString() == before
