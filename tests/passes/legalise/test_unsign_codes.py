"""The pass unsign_codes on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from conftest import run_onnx
from small_graphs import RANDOM, W8A8, Builder, linear_model, listing, result_of, site_of, unchanged

from dq_export.passes.base import run_passes
from dq_export.passes.canonical.insert_qdq import InsertQdq
from dq_export.passes.legalise.unsign_codes import UnsignCodes


def test_unsign_codes() -> None:
    model = linear_model([1])
    run_passes(model, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    feed = {"x": 9 * RANDOM.normal(size=(2, 3, 8)).astype(np.float32), "timestep": np.asarray([150])}  # saturates too
    signed = run_onnx(model, feed)
    run_passes(model, [UnsignCodes()])
    assert "QuantizeLinear(x, Gather, activation_zero_point_uint8)" in listing(model)
    np.testing.assert_array_equal(run_onnx(model, feed), signed)


def test_unsign_codes_must_not_act() -> None:
    per_sample = linear_model(["B"])
    run_passes(per_sample, [InsertQdq(result=result_of(site_of(), 8), assigned={"fc0": W8A8})])
    assert "cases 1, 2" in unchanged(per_sample, UnsignCodes())
    b = Builder(x=(ir.DataType.FLOAT, ["B", 3, 8]))
    scale, zero = b.const("s", np.ones(8, dtype=np.float32)), b.const("z", np.zeros(8, dtype=np.int8))
    codes = b.node("QuantizeLinear", b.value["x"], scale, zero, axis=2)
    model = b.model(b.node("DequantizeLinear", codes, scale, zero, axis=2, shape=["B", 3, 8]))
    assert "cases 1, 2" in unchanged(model, UnsignCodes())
