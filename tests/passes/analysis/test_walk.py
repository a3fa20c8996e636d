"""Where a scaling goes: each rule on a graph of a few nodes, applied by the pass with random scalings and shifts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import run_onnx
from folds import fold_at_random
from small_graphs import Builder

from dq_export.passes.analysis.sites import graph_sites

FLOAT = ir.DataType.FLOAT
RANDOM = np.random.default_rng(5)


def tokens(**more: list[Any]) -> Builder:
    """Inputs x [B, 3, 8], c [B, 4] and further ones."""
    shapes = {"x": ["B", 3, 8], "c": ["B", 4], **more}
    return Builder(**{name: (FLOAT, shape) for name, shape in shapes.items()})


def linear(b: Builder, x: ir.Value, name: str, inputs: int, outputs: int, *, bias: bool = True) -> ir.Value:
    value: ir.Value = b.node("MatMul", x, b.weight(f"{name}.w", inputs, outputs), module=name)
    return b.node("Add", value, b.weight(f"{name}.b", outputs), module=name) if bias else value


def gemm(b: Builder, x: ir.Value, name: str, inputs: int, outputs: int) -> ir.Value:
    value: ir.Value = b.node(
        "Gemm", x, b.weight(f"{name}.w", outputs, inputs), b.weight(f"{name}.b", outputs), module=name, transB=1
    )
    return value


def heads(b: Builder, x: ir.Value, name: str) -> ir.Value:
    """[B, T, 8] -> [B, 2, T, 4]."""
    shape = b.node("Reshape", x, b.const(f"{name}.shape", np.asarray([0, -1, 2, 4])))
    value: ir.Value = b.node("Transpose", shape, perm=[0, 2, 1, 3])
    return value


def attention(b: Builder, source: ir.Value, values: ir.Value, *, softmax: bool = True) -> ir.Value:
    """Softmax of the scores of `source` times values [B, 2, T, 4], back in [B, T, 8]."""
    queries = heads(b, linear(b, source, "q", 8, 8), "q")
    keys = b.node("Transpose", heads(b, linear(b, source, "k", 8, 8), "k"), perm=[0, 1, 3, 2])
    scores = b.node("MatMul", queries, keys)
    scores = b.node("Softmax", scores, axis=-1) if softmax else b.node("Sigmoid", scores)
    mixed = b.node("Transpose", b.node("MatMul", scores, values), perm=[0, 2, 1, 3])
    value: ir.Value = b.node("Reshape", mixed, b.const("flat", np.asarray([0, -1, 8])))
    return value


def chunks(b: Builder, source: ir.Value, count: int) -> list[ir.Value]:
    """Each chunk of [B, count * 8] as [B, 1, 8]."""
    axis = b.const("axis", np.asarray([1]))
    return [b.node("Unsqueeze", chunk, axis) for chunk in b.node("Split", source, outputs=count, axis=1, num_outputs=count)]


def norm(b: Builder, x: ir.Value) -> ir.Value:
    normed: ir.Value = b.node("LayerNormalization", x, b.const("ones", np.ones(8, dtype=np.float32)), axis=-1)
    return normed


def behind_a_linear(b: Builder) -> ir.Value:
    return linear(b, b.value["x"], "up", 8, 8)


def behind_a_linear_without_bias(b: Builder) -> ir.Value:
    return linear(b, b.value["x"], "up", 8, 8, bias=False)


def behind_an_affine_norm(b: Builder) -> ir.Value:
    normed: ir.Value = b.node("LayerNormalization", b.value["x"], b.weight("gain", 8), b.weight("bias", 8), axis=-1)
    return normed


def behind_a_norm_without_bias(b: Builder) -> ir.Value:
    return norm(b, b.value["x"])


def behind_adaln(b: Builder) -> ir.Value:
    shift, scale = chunks(b, gemm(b, b.value["c"], "mod", 4, 16), 2)
    gain = b.node("Add", scale, b.const("one", np.float32(1)))
    result: ir.Value = b.node("Add", b.node("Mul", norm(b, b.value["x"]), gain), shift)
    return result


def behind_shared_modulation(b: Builder) -> ir.Value:
    shift, scale = chunks(b, gemm(b, b.value["c"], "mod", 4, 16), 2)
    b.graph.outputs.append(b.node("Neg", b.node("Concat", shift, scale, axis=1), shape=["B", 2, 8]))
    gain = b.node("Add", b.node("Add", scale, b.weight("table", 1, 1, 8)), b.const("one", np.float32(1)))
    result: ir.Value = b.node("Add", b.node("Mul", norm(b, b.value["x"]), gain), shift)
    return result


def behind_attention(b: Builder) -> ir.Value:
    return attention(b, b.value["x"], heads(b, linear(b, b.value["x"], "v", 8, 8, bias=False), "v"))


def behind_attention_to_both_streams(b: Builder) -> ir.Value:
    both = [heads(b, linear(b, b.value[name], f"v_{name}", 8, 8), f"v_{name}") for name in ("x", "y")]
    source = b.node("Concat", b.value["x"], b.value["y"], axis=1)
    return attention(b, source, b.node("Concat", *both, axis=2))


def behind_a_gated_linear(b: Builder) -> ir.Value:
    value, gate = b.node("Split", linear(b, b.value["x"], "proj", 8, 16), outputs=2, axis=2, num_outputs=2)
    result: ir.Value = b.node("Mul", value, b.node("Gelu", gate))
    return result


def behind_a_root_mean_square_norm(b: Builder) -> ir.Value:
    normed = b.node(
        "Mul", b.value["x"], b.node("Reciprocal", b.node("ReduceMax", b.value["x"], b.const("last", np.asarray([-1]))))
    )
    result: ir.Value = b.node("Mul", normed, b.weight("gain", 8))
    return result


def behind_slices_of_a_linear(b: Builder) -> ir.Value:
    whole, axis = linear(b, b.value["x"], "proj", 8, 16), b.const("axis", np.asarray([2]))
    first, last = (
        b.node("Slice", whole, b.const(f"from{i}", np.asarray([i])), b.const(f"to{i}", np.asarray([i + 8])), axis) for i in (0, 8)
    )
    b.graph.outputs.append(b.node("Neg", first, shape=["B", 3, 8]))
    return last


def behind_a_number_that_is_added(b: Builder) -> ir.Value:
    result: ir.Value = b.node("Add", linear(b, b.value["x"], "up", 8, 8), b.const("half", np.float32(0.5)))
    return result


def behind_a_part_by_part_concat(b: Builder) -> ir.Value:
    result: ir.Value = b.node(
        "Concat", linear(b, b.value["x"], "one", 8, 3), b.node("Gelu", linear(b, b.value["x"], "two", 8, 5)), axis=2
    )
    return result


Rule = Callable[[Builder], ir.Value]
FREE: list[tuple[Rule, list[tuple[str, str, tuple[int, int], bool]]]] = [
    (behind_a_linear, [("linear", "up", (0, 8), True)]),
    (behind_a_number_that_is_added, [("linear", "up", (0, 8), True)]),
    (behind_a_linear_without_bias, [("linear", "up", (0, 8), True)]),
    (behind_an_affine_norm, [("norm", "", (0, 8), True)]),
    (behind_a_norm_without_bias, [("norm", "", (0, 8), True)]),
    (behind_adaln, [("linear", "mod", (8, 16), False), ("linear", "mod", (0, 8), True)]),
    (behind_attention, [("linear", "v", (0, 8), True)]),
    (behind_attention_to_both_streams, [("linear", "v_x", (0, 8), True), ("linear", "v_y", (0, 8), True)]),
    (behind_a_gated_linear, [("linear", "proj", (0, 8), False)]),
    (behind_a_root_mean_square_norm, [("constant", "", (0, 8), False)]),
    (behind_slices_of_a_linear, [("linear", "proj", (8, 16), True)]),
    (behind_shared_modulation, [("norm", "", (0, 8), False), ("vector", "", (0, 8), True)]),
    (behind_a_part_by_part_concat, [("linear", "one", (0, 3), True), ("token", "", (0, 5), True)]),
]
"""(what x is behind, [kind, linear, rows, shift of each part])."""


def modelled(rule: Rule) -> tuple[ir.Model, dict[str, Any]]:
    """A graph whose linear `reader` reads what the rule makes, and its inputs."""
    b = tokens(y=["B", 2, 8])
    result = rule(b)
    others = list(b.graph.outputs)
    b.graph.outputs.clear()
    model = b.shaped(linear(b, result, "reader", 8, 6), *others)
    for name, rank in (("x", 3), ("c", 2), ("y", 3)):
        assert len(b.value[name].shape or ()) == rank
    shapes = {"x": (2, 3, 8), "c": (2, 4), "y": (2, 2, 8)}
    return model, {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("rule", "expected"), FREE, ids=[rule.__name__ for rule, _ in FREE])
def test_the_scaling_goes_where_it_is_cheapest_and_the_output_stays(rule: Rule, expected: list[Any]) -> None:
    model, feed = modelled(rule)
    site = next(item.site for item in graph_sites(model) if item.site.name == "reader")
    parts = [(part.kind, part.name if part.kind == "linear" else "", part.rows, part.shift) for part in site.fold.parts]
    assert parts == expected
    assert site.fold.shifts == any(part.shift for part in site.fold.parts)
    before = run_onnx(model, feed)
    fold_at_random(model, ("reader",))
    after = run_onnx(model, feed)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def residual(b: Builder) -> ir.Value:
    result = linear(b, b.value["x"], "up", 8, 8)
    b.graph.outputs.append(b.node("Neg", result, shape=["B", 3, 8]))
    return result


def output(b: Builder) -> ir.Value:
    result = linear(b, b.value["x"], "up", 8, 8)
    result.shape = ir.Shape(["B", 3, 8])
    b.graph.outputs.append(result)
    return result


def gelu(b: Builder) -> ir.Value:
    result: ir.Value = b.node("Gelu", linear(b, b.value["x"], "up", 8, 8))
    return result


def silu(b: Builder) -> ir.Value:
    value = linear(b, b.value["x"], "up", 8, 8)
    result: ir.Value = b.node("Mul", value, b.node("Sigmoid", value))
    return result


def overlapping(b: Builder) -> ir.Value:
    whole, axis = linear(b, b.value["x"], "proj", 8, 16), b.const("axis", np.asarray([2]))
    first, last = (
        b.node("Slice", whole, b.const(f"from{i}", np.asarray([i])), b.const(f"to{i}", np.asarray([i + 8])), axis) for i in (2, 8)
    )
    b.graph.outputs.append(b.node("Neg", first, shape=["B", 3, 8]))
    return last


def rows_that_are_read_whole(b: Builder) -> ir.Value:
    whole = linear(b, b.value["x"], "proj", 8, 16)
    first, _ = b.node("Split", whole, outputs=2, axis=2, num_outputs=2)
    b.graph.outputs.append(b.node("Neg", whole, shape=["B", 3, 16]))
    result: ir.Value = first
    return result


def channels_in_another_order(b: Builder) -> ir.Value:
    cut = b.node("Reshape", linear(b, b.value["x"], "up", 8, 8), b.const("cut", np.asarray([0, 0, 2, 4])))
    result: ir.Value = b.node("Reshape", b.node("Transpose", cut, perm=[0, 1, 3, 2]), b.const("joined", np.asarray([0, 0, 8])))
    return result


def rows_that_become_tokens(b: Builder) -> ir.Value:
    """A scaling of 8 channels would repeat along the 16 rows."""
    result: ir.Value = b.node("Reshape", gemm(b, b.value["c"], "up", 4, 16), b.const("shape", np.asarray([0, 2, 8])))
    return result


@pytest.mark.parametrize(
    "rule",
    [residual, output, gelu, silu, overlapping, rows_that_are_read_whole, channels_in_another_order, rows_that_become_tokens],
    ids=lambda rule: rule.__name__,
)
def test_the_scaling_stays_in_front_of_the_reader_where_nothing_can_take_it(rule: Rule) -> None:
    model, feed = modelled(rule)
    site = next(item.site for item in graph_sites(model) if item.site.name == "reader")
    assert [(part.kind, part.channels, part.shift) for part in site.fold.parts] == [("token", (0, 8), True)]
    before = run_onnx(model, feed)
    fold_at_random(model, ("reader",))
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_shift_passes_attention_only_where_the_weights_sum_to_one() -> None:
    b = tokens()
    mixed = attention(b, b.value["x"], heads(b, linear(b, b.value["x"], "v", 8, 8), "v"), softmax=False)
    model = b.shaped(linear(b, mixed, "reader", 8, 6))
    fold = graph_sites(model)[-1].site.fold
    assert (fold.kind, fold.shifts) == ("free", False)


@pytest.mark.parametrize("moved", [False, True], ids=["plain", "moved"])
def test_streams_that_are_slices_of_one_attention_share_one_scaling(moved: bool) -> None:
    b = tokens(y=["B", 2, 8])
    mixed = behind_attention_to_both_streams(b)
    one, two = b.node("Split", mixed, b.const("sizes", np.asarray([3, 2])), outputs=2, axis=1)
    one = b.node("Add", one, b.weight("offset", 8)) if moved else one
    model = b.shaped(linear(b, one, "to_out", 8, 6), linear(b, two, "to_add_out", 8, 6))
    first, second = graph_sites(model)[-2:]
    assert [part.name for part in first.site.fold.of_kind("linear")] == ["v_x", "v_y"]
    assert (second.site.shares, second.site.fold.parts) == ("to_out", ())
    feed = {"x": RANDOM.normal(size=(2, 3, 8)).astype(np.float32), "y": RANDOM.normal(size=(2, 2, 8)).astype(np.float32)}
    feed["c"] = np.zeros((2, 4), dtype=np.float32)
    before = run_onnx(model, feed)
    fold_at_random(model, ("to_out", "to_add_out"))
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_stream_that_something_else_reads_keeps_the_others_from_sharing() -> None:
    b = tokens(y=["B", 2, 8])
    one, two = b.node("Split", behind_attention_to_both_streams(b), b.const("sizes", np.asarray([3, 2])), outputs=2, axis=1)
    model = b.shaped(linear(b, one, "to_out", 8, 6), b.node("Neg", two))
    site = graph_sites(model)[-1].site
    assert (site.name, site.fold.kind) == ("to_out", "token")


def test_a_convolution_takes_no_shift_and_folds_into_a_group_norm_or_a_convolution() -> None:
    b = Builder(x=(FLOAT, [1, 8, 5, 5]))
    gain, bias = b.weight("gain", 8), b.weight("bias", 8)
    normed = b.node("GroupNormalization", b.value["x"], gain, bias, num_groups=2, shape=[1, 8, 5, 5])
    first = b.node("Conv", normed, b.weight("w1", 8, 8, 3, 3), b.weight("b1", 8), module="blocks.0.conv1", pads=[1, 1, 1, 1])
    second = b.node("Conv", first, b.weight("w2", 8, 8, 3, 3), module="blocks.0.conv2", pads=[1, 1, 1, 1])
    active = b.node("Mul", second, b.node("Sigmoid", second))
    model = b.shaped(b.node("Conv", active, b.weight("w3", 8, 8, 1, 1), module="blocks.0.conv3"))
    folds = {item.site.name: item.site.fold for item in graph_sites(model, convolutions=True)}
    kinds = {name: ([part.kind for part in fold.parts], fold.shifts) for name, fold in folds.items()}
    assert kinds == {
        "blocks.0.conv1": (["norm"], False),
        "blocks.0.conv2": (["convolution"], False),
        "blocks.0.conv3": (["token"], False),
    }
    feed = {"x": RANDOM.normal(size=(1, 8, 5, 5)).astype(np.float32)}
    before = run_onnx(model, feed)
    fold_at_random(model, tuple(folds), convolutions=True)
    np.testing.assert_allclose(run_onnx(model, feed), before, rtol=0, atol=1e-5 * np.abs(before).max())
