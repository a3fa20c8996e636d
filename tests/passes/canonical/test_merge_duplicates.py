"""The pass merge_duplicates on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from small_graphs import RANDOM, Builder, listing

from dq_export.passes.base import run_passes
from dq_export.passes.canonical.merge_duplicates import MergeDuplicates


def test_merge_duplicates() -> None:
    b = Builder(x=(ir.DataType.FLOAT, [2, 4]))
    same = RANDOM.normal(size=(4, 4)).astype(np.float32)
    one = b.node("MatMul", b.value["x"], b.const("w1", same), module="a.linear")
    two = b.node("MatMul", b.value["x"], b.const("w2", same), module="b.linear")
    model = b.model(b.node("Add", one, two, shape=[2, 4]))
    assert listing(model) == ["MatMul(x, w1)", "MatMul(x, w2)", "Add(MatMul, MatMul)"]
    run_passes(model, [MergeDuplicates()])
    assert listing(model) == ["MatMul(x, w1)", "Add(MatMul, MatMul)"]
    assert next(iter(model.graph)).name == "a.linear"


def test_merge_duplicates_keeps_what_differs_in_a_bit() -> None:  # case 1
    b = Builder(x=(ir.DataType.FLOAT, [2, 4]))
    weight = RANDOM.normal(size=(4, 4)).astype(np.float32)
    other = weight.copy()
    other[0, 0] = np.nextafter(other[0, 0], np.float32(9))
    one, two = (b.node("MatMul", b.value["x"], b.const(f"w{i}", w)) for i, w in enumerate((weight, other)))
    model = b.model(b.node("Add", one, two, shape=[2, 4]))
    assert MergeDuplicates().rewrite(model).changed == ()
    assert len(model.graph) == 3
