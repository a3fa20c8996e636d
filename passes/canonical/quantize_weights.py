"""Store weights as integer codes and a DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.grid import WeightGrid
from dq_export.core.qtypes import INT8
from dq_export.core.rule import Rule

from ..base import GraphError, GraphPass, PassReport, computed_initializer, initializer, stored
from ..match import LinearNode, element_type, linears


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizeWeights(GraphPass):
    """MatMul(x, W)  ->  MatMul(x, DequantizeLinear(codes, scale, 0)).

    One scale per channel: int8 or float8e4m3fn[K, N], scale float32[N] at axis 1. Blocks: int8 or int4[K, N], scale
    float32[K / block, N], blocks along axis 0. Two levels: int4[K, N] times int8[K / block, 1, N] is an int8 code, dequantized
    with a scale[N] at axis 1: Cast -> Reshape -> Mul -> Reshape -> DequantizeLinear, all constant, so that a runtime
    computes it once, when it loads the graph. int4 with one scale per channel and quantized activations needs only a
    Cast. A convolution's codes are [N, channels, height, width], with a scale[N] at axis 0; int4 codes are stored widened to
    int8 there.

    Codes come from the calibration, or are the nearest to the folded weight, ties to even. Zero points are explicit: without
    them ONNX Runtime runs the GEMM in float.

    It does not act where
        1. the recipe leaves the linear float,
        2. the weight is already stored as codes.

    Exactness: lossy by design; each weight moves by at most scale / 2.

    Args:
        result: the scales of all quantized weights.
        assigned: the deciding rule of every linear.
    """

    name: ClassVar[str] = "quantize_weights"
    after: ClassVar[tuple[str, ...]] = ("fold_transpose", "merge_duplicates")
    result: CalibrationResult
    assigned: Mapping[str, Rule]

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for name, linear in linears(model).items():
            scheme = self.assigned[name].scheme
            if scheme.weight is None:
                skipped.append(f"'{name}': {self.assigned[name].reason or 'float in the recipe'} (case 1)")
            elif stored(linear.gemm.inputs[1]) is not None:
                grid, codes = self.result.grid(name, scheme.weight.qtype), self.result.codes.get(name)
                _quantize(model.graph, linear, grid, codes, widened=scheme.two_level)
                changed.append(f"'{name}' {self.assigned[name].action}")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _quantize(
    graph: ir.Graph, linear: LinearNode, grid: WeightGrid, codes: npt.NDArray[np.int8] | None, *, widened: bool
) -> None:
    name, gemm, dtype = linear.name, linear.gemm, element_type(grid.qtype)
    if gemm.op_type == "Gemm":
        raise GraphError(f"'{name}' is a Gemm, which reads one row per sample; make it weight-only or float")
    reader, (width, depth) = linear.weight_reader(), linear.shape
    blocked = grid.scale.ndim == 2
    if not grid.fits(width, depth) or (codes is not None and codes.shape != (width, depth)):
        raise GraphError(f"'{name}': scales {grid.scale.shape} do not fit a weight {(depth, width)}; calibrate again")
    if gemm.op_type == "Conv":
        _quantize_convolution(graph, linear, grid, codes)
        return

    def compute() -> npt.NDArray[np.generic]:
        transposed: npt.NDArray[np.generic] = (grid.codes(reader()) if codes is None else codes).T.astype(dtype.numpy())
        return transposed

    value = computed_initializer(graph, f"{name}.weight_codes", dtype, (depth, width), compute)
    if widened:
        value = _widened(graph, gemm, name, value, grid.multiplier)
    steps = initializer(graph, f"{name}.weight_scale", grid.scale)
    assert value.dtype is not None
    zero = initializer(graph, f"{name}.weight_zero_point", np.zeros(grid.scale.shape, dtype=value.dtype.numpy()))
    attributes = {"axis": 0, "block_size": depth // grid.blocks} if blocked else {"axis": 1}
    node = ir.node("DequantizeLinear", [value, steps, zero], attributes=attributes, name=f"{name}.weight_dq")
    node.outputs[0].shape, node.outputs[0].dtype = ir.Shape((depth, width)), ir.DataType.FLOAT
    graph.insert_before(gemm, node)
    gemm.replace_input_with(1, node.outputs[0])


def _quantize_convolution(graph: ir.Graph, linear: LinearNode, grid: WeightGrid, codes: npt.NDArray[np.int8] | None) -> None:
    name, gemm, reader, tensor = linear.name, linear.gemm, linear.weight_reader(), stored(linear.gemm.inputs[1])
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    dtype = element_type(grid.qtype) if grid.qtype.stored_bits == INT8.stored_bits else ir.DataType.INT8

    def compute() -> npt.NDArray[np.generic]:
        rounded = grid.codes(reader()) if codes is None else codes.astype(np.float32)
        if grid.multiplier is not None:
            rounded = rounded * np.repeat(grid.multiplier.T.astype(np.float32), rounded.shape[1] // grid.blocks, axis=1)
        stored_codes: npt.NDArray[np.generic] = rounded.reshape(shape).astype(dtype.numpy())
        return stored_codes

    value = computed_initializer(graph, f"{name}.weight_codes", dtype, shape, compute)
    steps = initializer(graph, f"{name}.weight_scale", grid.scale)
    zero = initializer(graph, f"{name}.weight_zero_point", np.zeros(grid.scale.shape, dtype=dtype.numpy()))
    node = ir.node("DequantizeLinear", [value, steps, zero], attributes={"axis": 0}, name=f"{name}.weight_dq")
    node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(shape), ir.DataType.FLOAT
    graph.insert_before(gemm, node)
    gemm.replace_input_with(1, node.outputs[0])


def _widened(graph: ir.Graph, gemm: ir.Node, name: str, codes: ir.Value, multiplier: npt.NDArray[np.int8] | None) -> ir.Value:
    """int8[K, N]: the codes times their blocks' multipliers.

    All of it is int8, also the product: ONNX Runtime folds these nodes when it loads a graph, and holds their results of all
    weights at once. With a product of int32 that takes 17 bytes for each weight, so 4.
    """
    assert codes.shape is not None
    depth, width = codes.shape.numpy()
    nodes = [ir.node("Cast", [codes], attributes={"to": ir.DataType.INT8.value})]
    if multiplier is not None:
        blocks = len(multiplier)
        times = initializer(graph, f"{name}.weight_multiplier", multiplier.astype(np.int8)[:, None, :])
        cut = initializer(graph, f"{name}.weight_blocks", np.asarray([blocks, depth // blocks, width], dtype=np.int64))
        joined_shape = initializer(graph, f"{name}.weight_shape", np.asarray([depth, width], dtype=np.int64))
        split = ir.node("Reshape", [nodes[0].outputs[0], cut])
        product = ir.node("Mul", [split.outputs[0], times])
        nodes += [split, product, ir.node("Reshape", [product.outputs[0], joined_shape])]
    graph.insert_before(gemm, nodes)
    result = nodes[-1].outputs[0]
    result.dtype, result.shape = ir.DataType.INT8, codes.shape
    return result
