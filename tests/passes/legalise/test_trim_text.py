"""Padding of texts, which attention does not look at."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import run_onnx
from onnx import parser

from dq_export.passes.base import PassReport, run_passes
from dq_export.passes.legalise.trim_text import TrimText

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
attention (float[batch, 4, 8] x, float[batch, length, 8] text, float[batch, length] mask) => (float[batch, 4, 8] y)
<float one = {1.0}, float hidden = {-10000.0}, int64[1] first = {1}>
{
    k = Mul(text, one)
    keys = Transpose <perm = [0, 2, 1]> (k)
    scores = MatMul(x, keys)
    padding = Sub(one, mask)
    bias = Mul(padding, hidden)
    row = Unsqueeze(bias, first)
    biased = Add(scores, row)
    weights = Softmax <axis = -1> (biased)
    values = Add(k, one)
    y = MatMul(weights, values)
}
"""


def trimmed(text: str = GRAPH) -> tuple[ir.Model, ir.Model, PassReport]:
    """The graph, the same after the pass, and what the pass reports."""
    before = ir.from_proto(parser.parse_model(text))
    for node in before.graph:
        node.name = node.outputs[0].name
    after = ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(before).SerializeToString()))
    return before, after, run_passes(after, [TrimText()])[0]


def feed_of(lengths: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    batch = len(lengths)
    return {
        "x": rng.normal(size=(batch, 4, 8)).astype(np.float32),
        "text": rng.normal(size=(batch, 12, 8)).astype(np.float32),
        "mask": (np.arange(12) < np.asarray(lengths)[:, None]).astype(np.float32),
    }


@pytest.mark.parametrize(("lengths", "length"), [([3, 5], 5), ([1], 1), ([12, 2], 12), ([4, 0], 12)], ids=str)
def test_the_longest_text_of_the_batch_decides_and_the_result_is_the_same(lengths: list[int], length: int) -> None:
    before, after, report = trimmed()
    assert report.changed == ("'text'",)
    feed = feed_of(lengths)
    assert np.array_equal(run_onnx(after, feed), run_onnx(before, feed))
    keys = next(node for node in after.graph if node.op_type == "Transpose").inputs[0]
    assert keys is not None
    keys.shape = ir.Shape(["batch", "kept", 8])
    after.graph.outputs[:] = [keys]
    assert run_onnx(after, feed).shape == (len(lengths), length, 8)


def test_a_mask_with_gaps_keeps_all_up_to_its_last_token() -> None:
    before, after, _ = trimmed()
    feed = feed_of([2, 3])
    feed["mask"][0, 8] = 1
    assert np.array_equal(run_onnx(after, feed), run_onnx(before, feed))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("float[batch, length] mask", "float[batch, 12] mask", ""),
        ("{-10000.0}", "{-5.0}", "case 2"),
        ("padding = Sub(one, mask)", "padding = Sub(mask, one)", "case 2"),
        ("biased = Add(scores, row)", "biased = Mul(scores, row)", "case 2"),
        ("weights = Softmax <axis = -1> (biased)", "weights = Softmax <axis = 1> (biased)", "case 2"),
        ("weights = Softmax <axis = -1> (biased)", "weights = Sigmoid(biased)", "case 2"),
        ("k = Mul(text, one)", "place = Squeeze(first)\n    k = CumSum(text, place)", "a CumSum, may mix"),
        ("y = MatMul(weights, values)", "plain = Softmax <axis = -1> (scores)\n    y = MatMul(plain, values)", "case 3"),
    ],
)
def test_it_leaves_other_texts_alone(old: str, new: str, reason: str) -> None:
    assert old in GRAPH
    _, after, report = trimmed(GRAPH.replace(old, new))
    assert not report.changed
    assert "Slice" not in [node.op_type for node in after.graph]
    assert [reason in line for line in report.skipped] == ([True] if reason else []), report.skipped
