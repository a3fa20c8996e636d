"""The pass plain_group_norms: what it writes, what that computes, and where it must not act."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from conftest import run_onnx
from small_graphs import Builder, listing, unchanged

from dq_export.passes.legalise.plain_group_norms import PlainGroupNorms

RANDOM = np.random.default_rng(7)
SIZES = ["B", 8, "height", "width"]


def normalized(kind: ir.DataType = ir.DataType.FLOAT, *, shape: list[Any] | None = SIZES) -> ir.Model:
    """A GroupNormalization of 8 channels in 4 groups."""
    b = Builder(x=(kind, SIZES))
    gain, bias = (b.const(name, RANDOM.normal(size=8).astype(kind.numpy())) for name in ("gain", "bias"))
    x = b.value["x"]
    if shape is None:
        x = b.node("Identity", x)
    result = b.node("GroupNormalization", x, gain, bias, num_groups=4, epsilon=1e-3, shape=shape)
    result.dtype = kind
    return b.model(result)


def test_the_result_equals_that_of_the_operator() -> None:
    model = normalized()
    feed = {"x": (RANDOM.normal(size=(2, 8, 5, 3)) * 3 + 2).astype(np.float32)}
    groups = feed["x"].astype(np.float64).reshape(2, 4, -1)
    normal = (groups - groups.mean(axis=2, keepdims=True)) / np.sqrt(groups.var(axis=2, keepdims=True) + 1e-3)
    gain, bias = (model.graph.initializers[name].const_value.numpy()[:, None, None] for name in ("gain", "bias"))  # type: ignore[union-attr]
    exact = normal.reshape(feed["x"].shape) * gain + bias
    assert PlainGroupNorms().rewrite(model).changed == ("'GroupNormalization_0'",)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert listing(model) == [
        "Shape(x)", "Reshape(x, GroupNormalization_0.groups)",
        "InstanceNormalization(Reshape, GroupNormalization_0.ones, GroupNormalization_0.zeros)",
        "Reshape(InstanceNormalization, Shape)", "Mul(Reshape, GroupNormalization_0.gain)", "Add(Mul, GroupNormalization_0.bias)",
    ]  # fmt: skip
    np.testing.assert_allclose(run_onnx(model, feed), exact, rtol=1e-5, atol=1e-5)
    unchanged(model, PlainGroupNorms())


def test_it_must_not_act() -> None:
    assert "case 2" in unchanged(normalized(ir.DataType.FLOAT16), PlainGroupNorms())
    assert "case 2" in unchanged(normalized(shape=None), PlainGroupNorms())
    b = Builder(x=(ir.DataType.FLOAT, SIZES), gain=(ir.DataType.FLOAT, [8]))
    result = b.node("GroupNormalization", b.value["x"], b.value["gain"], b.const("bias", np.zeros(8, np.float32)), num_groups=4)
    assert "case 1" in unchanged(b.model(result), PlainGroupNorms())
