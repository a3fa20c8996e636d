"""Weights stored as the graph reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from conftest import feed_of, load_graph, run_onnx

from dq_export.passes.base import run_passes, stored
from dq_export.passes.canonical.fold_transpose import FoldTranspose
from dq_export.passes.match import linears


def test_weights_become_initializers_and_nothing_else_changes(tiny: Any, tiny_onnx: Path) -> None:
    model, feed = load_graph(tiny_onnx), feed_of(tiny)
    before = run_onnx(model, feed)
    moved = [node for node in model.graph if node.op_type == "Transpose" and stored(node.inputs[0]) is not None]
    report = run_passes(model, [FoldTranspose()])[0]
    assert len(report.changed) == len(moved) == 12  # six linears a block; the others are Gemms, which transpose as they read
    np.testing.assert_array_equal(run_onnx(model, feed), before)
    for name, linear in linears(model).items():
        np.testing.assert_array_equal(linear.weight(), tiny.weight(name))


def test_transposed_activations_stay(tiny_onnx: Path) -> None:
    """Case 1."""
    model = load_graph(tiny_onnx)
    of_activations = [n for n in model.graph if n.op_type == "Transpose" and stored(n.inputs[0]) is None]
    run_passes(model, [FoldTranspose()])
    assert of_activations
    assert [node for node in model.graph if node.op_type == "Transpose"] == of_activations
    assert all(isinstance(node, ir.Node) for node in of_activations)
