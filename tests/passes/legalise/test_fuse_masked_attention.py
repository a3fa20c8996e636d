"""Attention with a mask of keys as one operator: two blocks that share the mask, which diffusers repeats for each head."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx, sqnr
from onnx import parser

from dq_export.passes.base import PassReport, run_passes
from dq_export.passes.legalise.fuse_attention import FuseAttention

VALUES = """
  float[B, 2, Q, 4] q{i}, float[B, 2, 4, K] kt{i}, float[B, K, 2, 4] k4{i}, float[B, 2, K, 4] k{i}, float[B, 2, K, 4] v{i},
  float[B, Q, 2, 4] q4{i}
"""
BLOCK = """
    q4{i} = Reshape(x{i}, heads)
    q{i} = Transpose <perm = [0, 2, 1, 3]> (q4{i})
    qs{i} = Mul(q{i}, scale)
    k4{i} = Reshape(text, heads)
    k{i} = Transpose <perm = [0, 2, 1, 3]> (k4{i})
    k3{i} = Reshape(k{i}, flat)
    k3t{i} = Transpose <perm = [0, 2, 1]> (k3{i})
    kt{i} = Reshape(k3t{i}, split)
    scores{i} = MatMul(qs{i}, kt{i})
    biased{i} = Add(scores{i}, {mask})
    weights{i} = Softmax <axis = -1> (biased{i})
    v4{i} = Reshape(text, heads)
    v{i} = Transpose <perm = [0, 2, 1, 3]> (v4{i})
    y4{i} = MatMul(weights{i}, v{i})
    yt{i} = Transpose <perm = [0, 2, 1, 3]> (y4{i})
    x{next} = Reshape(yt{i}, merge)
"""


def masked(mask: str = "by_head") -> ir.Model:
    """Two blocks of attention of x to a text of 5 tokens."""
    blocks = "".join(BLOCK.replace("{i}", str(i)).replace("{next}", str(i + 1)).replace("{mask}", mask) for i in (0, 1))
    values = ",".join(VALUES.replace("{i}", str(i)) for i in (0, 1))
    model = ir.from_proto(
        parser.parse_model(f"""
<ir_version: 10, opset_import: ["" : 21]>
attention (float[B, Q, 8] x0, float[B, 5, 8] text, float[B, 1, 1, 5] row, float[B, 2, 1, 5] two) => (float[B, Q, 8] x2)
<int64[4] heads = {{0, -1, 2, 4}}, int64[3] flat = {{-1, 5, 4}}, int64[4] split = {{-1, 2, 4, 5}}, int64[3] merge = {{0, -1, 8}},
 int64[4] twice = {{1, 2, 1, 1}}, int64[3] rank3 = {{-1, 1, 5}}, int64[4] rank4 = {{-1, 2, 1, 5}}, float scale = {{0.5}},
 float[B, Q, 8] x1, float[B, 2, 1, 5] repeated, float[B, 2, 1, 5] by_head, {values.replace("K", "5")}>
{{
    repeated = Expand(row, twice)
    joined = Reshape(repeated, rank3)
    by_head = Reshape(joined, rank4)
    {blocks}
}}
""")
    )
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def fused(model: ir.Model) -> PassReport:
    return run_passes(model, [FuseAttention()])[0]


def feed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {"x0": (3, 7, 8), "text": (3, 5, 8), "two": (3, 2, 1, 5)}
    row = np.where(np.arange(5) < np.asarray([[5], [2], [1]]), 0, -10000).astype(np.float32)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | {"row": row[:, None, None]}


@pytest.mark.parametrize("mask", ["by_head", "row"])
def test_a_mask_is_spread_once_and_the_result_is_the_same(mask: str) -> None:
    model, exact = masked(mask), run_onnx(masked(mask), feed())
    assert len(fused(model).changed) == 2
    operators = [node for node in model.graph if node.op_type == "Attention"]
    masks = {node.inputs[3] for node in operators}
    assert len(operators) == 2
    assert len(masks) == 1, "all blocks read one mask"
    # Float32 sums of a few terms in another order.
    assert sqnr(exact, run_onnx(model, feed())) > 120


def test_a_mask_that_differs_by_head_stays() -> None:
    model = masked("two")
    report = fused(model)
    assert report.changed == ()
    assert len(report.skipped) == 2
    assert "(case 1)" in report.skipped[0]
