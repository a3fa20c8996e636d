"""Attention as one operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import feed_of, load_graph, run_onnx, sqnr

from dq_export.passes.base import PassReport, run_passes
from dq_export.passes.legalise.fuse_attention import FuseAttention


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
