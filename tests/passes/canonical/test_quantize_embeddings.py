"""Tables of embeddings as codes: the nodes, what stays, and the numbers on ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx
from small_graphs import Builder, listing, unchanged

from dq_export.core.grid import cover
from dq_export.core.scheme import scheme_of
from dq_export.passes.base import run_passes, stored
from dq_export.passes.canonical import quantize_embeddings
from dq_export.passes.canonical.quantize_embeddings import QuantizeEmbeddings

ROWS, WIDTH = 10, 64


def lookup() -> ir.Model:
    b = Builder(ids=(ir.DataType.INT64, [1, 5]))
    words = b.node("Gather", b.weight("words", ROWS, WIDTH), b.value["ids"], shape=[1, 5, WIDTH], axis=0)
    places = b.node("Gather", b.weight("places", ROWS, WIDTH), b.value["ids"], shape=[1, 5, WIDTH], axis=0)
    return b.model(b.node("Add", words, places, shape=[1, 5, WIDTH]))


def test_the_rows_of_a_table_are_looked_up_as_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_embeddings, "TOGETHER", 3)  # several parts, of unequal size
    model, ids = lookup(), np.array([[0, 9, 3, 3, 7]])
    table = np.array(stored(model.graph.initializers["words"]).numpy())
    grid = cover(table, scheme_of("weight-only", group_size=32))
    before = run_onnx(model, {"ids": ids})
    run_passes(model, [QuantizeEmbeddings(grids={"words": grid})])
    assert listing(model) == [
        "Gather(words_codes, ids)",
        "Gather(words_scale, ids)",
        "DequantizeLinear(Gather, Gather)",
        "Gather(places, ids)",
        "Add(DequantizeLinear, Gather)",
    ]
    assert "words" not in model.graph.initializers
    scale = np.abs(table).reshape(ROWS, 2, 32).max(axis=2) / 127
    moved = run_onnx(model, {"ids": ids}) - before
    assert (np.abs(moved).reshape(5, 2, 32) <= scale[ids[0]][..., None] * 0.5001).all()
    assert np.abs(moved).max() > 0


def test_a_table_without_a_grid_stays() -> None:
    """Case 1."""
    unchanged(lookup(), QuantizeEmbeddings(grids={}))
