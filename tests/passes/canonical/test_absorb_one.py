"""The pass absorb_one on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import run_onnx
from small_graphs import listing, modulated, modulation_feed, unchanged

from dq_export.passes.base import run_passes
from dq_export.passes.canonical.absorb_one import AbsorbOne


def test_absorb_one() -> None:
    model, feed = modulated(), modulation_feed()
    before = run_onnx(model, feed)
    assert "Add(Unsqueeze, one)" in listing(model)
    run_passes(model, [AbsorbOne()])
    assert listing(model) == [
        "Gemm(c, w, norm1.linear.bias)",
        "Split(Gemm)",
        "Unsqueeze(Split, axis)",
        "Unsqueeze(Split, axis)",
        "Mul(x, Unsqueeze)",
        "Add(Mul, Unsqueeze)",
    ]
    # One addition is done before the row's sum instead of after: a few float32 roundings.
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"linear": False}, r"case 1"), ({"second_reader": True}, r"case 2"), ({"constant": 1.5}, "")],
    ids=["case-1", "case-2", "case-3"],
)
def test_absorb_one_must_not_act(options: dict[str, Any], reason: str) -> None:
    assert reason in unchanged(modulated(**options), AbsorbOne())
