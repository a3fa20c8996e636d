"""Attention as one operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import feed_of, load_graph, run_onnx, sqnr
from onnx import parser

from dq_export.core.network import Axis
from dq_export.passes.base import PassReport, run_passes
from dq_export.passes.legalise.fuse_attention import FuseAttention
from dq_export.passes.sizes import size_of, write_sizes


def fused(path: Path, edit: Callable[[ir.Graph], None] = lambda graph: None) -> tuple[ir.Model, PassReport]:
    model = load_graph(path)
    edit(model.graph)
    return model, run_passes(model, [FuseAttention()])[0]


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_every_block_has_one_operator_and_computes_the_same(tiny: Any, tiny_onnx: Path) -> None:
    feed = feed_of(tiny)
    exact = run_onnx(load_graph(tiny_onnx), feed)
    model, report = fused(tiny_onnx)
    assert len(report.changed) == 2
    assert kinds(model).count("Attention") == 2
    assert "Softmax" not in kinds(model)
    assert model.opset_imports[""] == 23
    # Float32 products of 16 and sums of 16 tokens in another order: 2^-24 times a few dozen terms is 130 dB and more.
    assert sqnr(exact, run_onnx(model, feed)) > 110


LONG = """
  float[B, Q, 2, 4] q4, float[B, 2, Q, 4] q, float[B, 2, Q, 4] qs, float[B, K, 2, 4] k4, float[B, 2, K, 4] k,
  float[M, K, 4] k3, float[M, 4, K] k3t, float[B, 2, 4, K] kt, float[B, 2, Q, K] scores, float[B, 2, Q, K] weights,
  float[B, K, 2, 4] v4, float[B, 2, K, 4] v, float[B, 2, Q, 4] y4, float[B, Q, 2, 4] yt
"""


def plain(queries: str, keys: str) -> ir.Model:
    """Attention of two rows x to y with two heads of 4 channels, as the exporter writes it."""
    text = f"""
<ir_version: 10, opset_import: ["" : 21]>
attention (float[B, Q, 8] x, float[B, K, 8] y) => (float[B, Q, 8] result)
<int64[4] heads = {{0, -1, 2, 4}}, int64[3] flat = {{4, -1, 4}}, int64[4] split = {{2, 2, 4, -1}},
 int64[3] merge = {{0, -1, 8}}, float scale = {{0.5}}, {LONG}>
{{
    q4 = Reshape(x, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q4)
    qs = Mul(q, scale)
    k4 = Reshape(y, heads)
    k = Transpose <perm = [0, 2, 1, 3]> (k4)
    k3 = Reshape(k, flat)
    k3t = Transpose <perm = [0, 2, 1]> (k3)
    kt = Reshape(k3t, split)
    scores = MatMul(qs, kt)
    weights = Softmax <axis = -1> (scores)
    v4 = Reshape(y, heads)
    v = Transpose <perm = [0, 2, 1, 3]> (v4)
    y4 = MatMul(weights, v)
    yt = Transpose <perm = [0, 2, 1, 3]> (y4)
    result = Reshape(yt, merge)
}}
"""
    return ir.from_proto(
        parser.parse_model(text.replace("Q,", f"{queries},").replace("K,", f"{keys},").replace("K]", f"{keys}]"))
    )


@pytest.mark.parametrize(
    ("queries", "keys", "operator"),
    [
        ("1024", "1024", "MultiHeadAttention"),
        ("4096", "77", "Attention"),
        ("256", "256", "Attention"),
        ("many", "many", "MultiHeadAttention"),
        ("few", "few", "Attention"),
        ("many", "few", "Attention"),
        ("N", "N", "Attention"),
    ],
)
def test_many_scores_go_to_the_operator_that_keeps_a_tile_of_them(queries: str, keys: str, operator: str) -> None:
    rng = np.random.default_rng(0)
    rows = {name: size_of(size, {"many": 1024, "few": 77, "N": 48}) for name, size in (("x", queries), ("y", keys))}
    feed = {name: rng.normal(size=(2, count, 8)).astype(np.float32) for name, count in rows.items()}
    exact = run_onnx(plain(queries, keys), feed)
    model = plain(queries, keys)
    write_sizes(model, [Axis("many", 1024, 4096), Axis("few", 77, 77)])
    assert len(run_passes(model, [FuseAttention()])[0].changed) == 1
    assert kinds(model) == [operator]
    assert sqnr(exact, run_onnx(model, feed)) > 110


def first(graph: ir.Graph, kind: str) -> ir.Node:
    return next(node for node in graph if node.op_type == kind)


def mask(graph: ir.Graph) -> None:
    softmax = first(graph, "Softmax")
    zero = ir.Value(name="mask", const_value=ir.tensor(np.zeros(1, dtype=np.float32), name="mask"), shape=ir.Shape([1]))
    zero.dtype = ir.DataType.FLOAT
    graph.register_initializer(zero)
    add = ir.node("Add", [softmax.inputs[0], zero])
    graph.insert_before(softmax, add)
    softmax.replace_input_with(0, add.outputs[0])


def reorder_heads(graph: ir.Graph) -> None:
    softmax = first(graph, "Softmax")
    product = next(iter(softmax.outputs[0].uses()))[0]
    merged = next(iter(product.outputs[0].uses()))[0]
    merged.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3])


def scale_by_channel(graph: ir.Graph) -> None:
    softmax = first(graph, "Softmax")
    assert softmax.inputs[0] is not None
    scores = softmax.inputs[0].producer()
    assert scores is not None
    query = scores.inputs[0].producer()  # type: ignore[union-attr]
    assert query is not None
    assert query.op_type == "Mul"
    factor = ir.tensor(np.ones(16, dtype=np.float32), name="factor")
    value = ir.Value(name="factor", const_value=factor, shape=ir.Shape([16]))
    value.dtype = ir.DataType.FLOAT
    graph.register_initializer(value)
    query.replace_input_with(1, value)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (mask, "its input is not a product of query and key, with or without a mask of keys (case 1)"),
        (scale_by_channel, "query, key or value is not split into heads (case 2)"),
        (reorder_heads, "its result is not merged back from heads (case 3)"),
    ],
)
def test_other_patterns_than_plain_attention_stay(edit: Any, reason: str, tiny_onnx: Path) -> None:
    model, report = fused(tiny_onnx, edit)
    assert [line.split(": ", 1)[1] for line in report.skipped] == [reason]
    assert kinds(model).count("Attention") == 1
    assert kinds(model).count("Softmax") == 1
