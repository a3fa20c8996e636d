"""The pass insert_qdq on graphs of a few nodes: what it writes, and where it must not act."""

from __future__ import annotations

from small_graphs import FLOAT, W8A8, linear_model, listing, result_of, site_of, unchanged

from dq_export.passes.base import run_passes
from dq_export.passes.canonical.insert_qdq import InsertQdq


def test_insert_qdq_with_a_table() -> None:
    model = linear_model([1], readers=2)
    assigned = {"fc0": W8A8, "fc1": W8A8}
    run_passes(model, [InsertQdq(result=result_of(site_of(2), 8), assigned=assigned)])
    assert listing(model) == [
        "Cast(timestep)",
        "Unsqueeze(Cast, timestep_axis)",
        "GreaterOrEqual(Unsqueeze, timestep_edges)",
        "Cast(GreaterOrEqual)",
        "ReduceSum(Cast, timestep_axis)",
        "Squeeze(ReduceSum)",
        "Gather(fc0.activation_scale_table, Squeeze)",
        "QuantizeLinear(x, Gather, activation_zero_point)",
        "DequantizeLinear(QuantizeLinear, Gather, activation_zero_point)",
        "MatMul(DequantizeLinear, w0)",
        "MatMul(DequantizeLinear, w1)",
    ]


def test_insert_qdq_with_one_bin_is_static() -> None:
    model = linear_model([1])
    run_passes(model, [InsertQdq(result=result_of(site_of(), 8, bins=1), assigned={"fc0": W8A8})])
    assert listing(model) == [
        "QuantizeLinear(x, fc0.activation_scale, activation_zero_point)",
        "DequantizeLinear(QuantizeLinear, fc0.activation_scale, activation_zero_point)",
        "MatMul(DequantizeLinear, w0)",
    ]


def test_insert_qdq_must_not_act() -> None:
    result = result_of(site_of(), 8)
    unchanged(linear_model([1]), InsertQdq(result=result, assigned={"fc0": FLOAT}))  # case 1
    model = linear_model([1])
    run_passes(model, [InsertQdq(result=result, assigned={"fc0": W8A8})])
    unchanged(model, InsertQdq(result=result, assigned={"fc0": W8A8}))  # case 2


def test_insert_qdq_leaves_a_float_reader_on_the_float_input() -> None:
    model = linear_model([1], readers=2)
    run_passes(model, [InsertQdq(result=result_of(site_of(2), 8), assigned={"fc0": W8A8, "fc1": FLOAT})])
    assert listing(model)[-2:] == ["MatMul(DequantizeLinear, w0)", "MatMul(x, w1)"]
