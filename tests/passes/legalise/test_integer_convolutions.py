"""The pass integer_convolutions on graphs of a few nodes: what it writes, what that computes, and where it must not act."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import run_onnx
from small_graphs import RANDOM, W8A8, Builder, listing, result_of, unchanged

from dq_export.core.folds import explicit
from dq_export.core.network import InputSite
from dq_export.passes.base import run_passes
from dq_export.passes.canonical.insert_qdq import InsertQdq
from dq_export.passes.canonical.quantize_weights import QuantizeWeights
from dq_export.passes.legalise.factor_scale import FactorScale
from dq_export.passes.legalise.integer_convolutions import IntegerConvolutions
from dq_export.passes.legalise.unsign_codes import UnsignCodes

NAME = "blocks.0.conv"
SITE = InputSite(name=NAME, linears=(NAME,), fold=explicit(NAME, 4))
RESULT = result_of(SITE, 4 * 9, scaled=False, out=6)
NARROW = result_of(SITE, 4, scaled=False, out=6)
ASSIGNED = {NAME: W8A8}
EDGE = 100
"""Timestep from which the second scale of `result_of` is used."""
SCALES = (0.02, 0.05)


def convolution(timestep: list[Any], *, biased: bool = True) -> ir.Model:
    """A quantized convolution in direct form, strided."""
    b = Builder(x=(ir.DataType.FLOAT, ["B", 4, 6, 6]), timestep=(ir.DataType.INT64, timestep))
    inputs = [b.value["x"], b.weight("w", 6, 4, 3, 3), *([b.weight("bias", 6)] if biased else [])]
    model = b.model(b.node("Conv", *inputs, module=NAME, pads=[1, 1, 1, 1], strides=[2, 2], shape=["B", 6, 3, 3]))
    next(iter(model.graph)).name = NAME
    run_passes(model, [QuantizeWeights(result=RESULT, assigned=ASSIGNED), InsertQdq(result=RESULT, assigned=ASSIGNED)])
    return model


def convolved(x: Any, weight: Any, bias: Any) -> Any:
    """numpy's convolution of stride 2 and padding 1."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    actual = np.zeros((len(x), len(weight), 3, 3))
    for row in range(3):
        for column in range(3):
            patch = padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            actual[:, :, row, column] = np.einsum("bchw,ochw->bo", patch, weight)
    return actual + bias[:, None, None]


@pytest.mark.parametrize("unsigned", [False, True], ids=["int8", "uint8"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("timestep", [[1], ["B"]], ids=["shared", "per-sample"])
def test_the_sum_of_products_of_codes_is_exact(timestep: list[Any], biased: bool, unsigned: bool) -> None:
    if not unsigned and tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("ONNX Runtime before 1.24 has ConvInteger for uint8 activations alone")
    model = convolution(timestep, biased=biased)
    weight, bias = (model.graph.initializers[name].const_value.numpy() if name in model.graph.initializers else np.zeros(6)
                    for name in ("blocks.0.conv.weight_codes", "bias"))  # fmt: skip
    passes = [FactorScale(result=RESULT, tables=timestep != [1]), IntegerConvolutions(), UnsignCodes(convolutions=unsigned)]
    run_passes(model, passes)
    operators = [line.partition("(")[0] for line in listing(model)]
    assert operators.count("ConvInteger") == operators.count("QuantizeLinear") == 1
    assert "Conv" not in operators
    assert operators.count("DequantizeLinear") == 1, "of the sums of products, to float"
    assert operators.count("Add") == biased
    node = next(node for node in model.graph if node.op_type == "ConvInteger")
    assert node.name == NAME
    types = [value.const_value.dtype for value in node.inputs[1:] if value is not None and value.const_value is not None]
    activation = ir.DataType.UINT8 if unsigned else ir.DataType.INT8
    assert types == [ir.DataType.UINT8, activation, ir.DataType.UINT8], "the pairs of types that have fast kernels"
    times = np.asarray([150] if timestep == [1] else [150, 50])
    feed = {"x": RANDOM.normal(size=(2, 4, 6, 6)).astype(np.float32), "timestep": times}
    scale = np.asarray([SCALES[int(t >= EDGE)] for t in np.broadcast_to(times, 2)])[:, None, None, None]
    codes = np.clip(np.rint(feed["x"] / scale.astype(np.float32)), -128, 127)
    exact = convolved(codes * scale, weight * 0.03, bias)
    np.testing.assert_allclose(run_onnx(model, feed), exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run_onnx(model, feed, optimize=True), exact, rtol=1e-5, atol=1e-5)


def test_the_bias_joins_a_vector_that_is_added_next() -> None:
    b = Builder(
        x=(ir.DataType.FLOAT, ["B", 4, 6, 6]),
        embedding=(ir.DataType.FLOAT, ["B", 6, 1, 1]),
        timestep=(ir.DataType.INT64, [1]),
    )
    reader = b.node("Conv", b.value["x"], b.weight("w", 6, 4, 1, 1), b.weight("bias", 6), module=NAME, shape=["B", 6, 6, 6])
    model = b.model(b.node("Add", reader, b.value["embedding"], shape=["B", 6, 6, 6]))
    run_passes(model, [QuantizeWeights(result=NARROW, assigned=ASSIGNED), InsertQdq(result=NARROW, assigned=ASSIGNED)])
    shape = {"x": (2, 4, 6, 6), "embedding": (2, 6, 1, 1)}
    feed = {name: RANDOM.normal(size=size).astype(np.float32) for name, size in shape.items()} | {"timestep": np.asarray([5])}
    exact = run_onnx(model, feed)
    run_passes(model, [IntegerConvolutions(), UnsignCodes(convolutions=True)])
    assert listing(model)[-3:] == [
        "DequantizeLinear(ConvInteger, Mul)", "Add(embedding, Conv_0.added_bias)", "Add(DequantizeLinear, Add)",
    ]  # fmt: skip
    np.testing.assert_allclose(run_onnx(model, feed), exact, rtol=1e-5, atol=1e-6)


def test_it_must_not_act() -> None:
    unsigned = convolution([1])
    run_passes(unsigned, [UnsignCodes()])
    assert "case 1: its input's codes" in unchanged(unsigned, IntegerConvolutions())
    along = convolution([1])
    dequantize = next(node for node in along.graph if node.name == f"{NAME}.weight_dq")
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 1)
    assert "case 1: its weight's codes" in unchanged(along, IntegerConvolutions())
    per_sample = convolution(["B"])
    assert "case 1" in unchanged(per_sample, IntegerConvolutions()), "a zero point for each sample"
    b = Builder(x=(ir.DataType.FLOAT, ["B", 4, 6, 6]))
    plain = b.model(b.node("Conv", b.value["x"], b.weight("w", 6, 4, 1, 1), module=NAME, shape=["B", 6, 6, 6]))
    assert unchanged(plain, IntegerConvolutions()) == "", "a float convolution"
