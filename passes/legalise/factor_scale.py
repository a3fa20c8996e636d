"""Turn run-time scales into constant ones: the factored form, for backends whose Q/DQ need constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.scales import ScaleTable, TokenScale

from ..base import GraphPass, PassReport, computed_initializer, constant, initializer, like, redirect, stored
from ..match import module_of
from ..names import FACTOR, SITE

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class FactorScale(GraphPass):
    """x -> Q(s) -> DQ(s) -> MatMul  ->  x * (c / s) -> Q(c) -> DQ(c) -> MatMul -> * (s / c), s computed and c constant.

    A factor that is constant along the rows of the GEMM commutes with it, so the codes are the same. c is the maximum of a
    table, or the constant of a scale for each token. With a timestep per sample the factors are [B, 1, 1], with a scale for
    each token [B, T, 1]. A convolution counts as a GEMM: its factors are [B, 1, 1, 1], and its bias becomes an Add after them.
    c is not 1: with c as large as the activations, a float16 GEMM result stays in range. TensorRT's GEMMs return c times the
    sum of products of codes and apply the weight's scales afterwards: `limit` keeps c small enough for that.

    It does not act where
        1. the scale is already a constant within the limit,
        2. the node does not quantize the input of a site,
        3. the dequantized value feeds other inputs than the first of MatMuls and convolutions,
        4. the scale comes from a table, and `tables` is False.

    Args:
        result: the scales, and for each linear a bound of |sum of products of codes|.
        tables: False leaves tables in the direct form, which some backends run if one timestep serves the batch.
        limit: the upper bound of c times that sum.

    Exactness: reorders float operations: x * (c / s) / c instead of x / s, so a value within 2^-22 of a rounding
    boundary may get the neighbouring code; everything else is equal up to float32 rounding.
    """

    name: ClassVar[str] = "factor_scale"
    after: ClassVar[tuple[str, ...]] = ("insert_qdq",)
    result: CalibrationResult
    tables: bool = True
    limit: float = math.inf

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
            dequantize = next(iter(quantize.outputs[0].uses()))[0]
            readers = [user for user, _ in dequantize.outputs[0].uses()]
            greatest = self._greatest(readers)
            fixed = constant(quantize.inputs[1])
            plan = self.result.sites.get(SITE.read(quantize))
            if fixed is not None and fixed.max() <= greatest:
                continue
            if plan is None or plan.activation is None:
                skipped.append(f"'{quantize.name}': it quantizes no site's input (case 2)")
            elif not all(user.op_type in ("MatMul", "Conv") for user in readers):
                skipped.append(f"'{quantize.name}': read by more than MatMuls and convolutions (case 3)")
            elif isinstance(plan.activation, ScaleTable) and fixed is None and not self.tables:
                skipped.append(f"'{quantize.name}': its table stays in the direct form (case 4)")
            else:
                scale, before, after = self._factors(model.graph, quantize, plan.activation, greatest)
                _factor(model.graph, (quantize, dequantize), scale, before, after)
                changed.append(f"'{quantize.name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))

    def _greatest(self, readers: Sequence[ir.Node]) -> float:
        """The greatest float32 c that keeps every reader's GEMM within the limit."""
        reach = max((self.result.reach.get(module_of(node), 0.0) for node in readers), default=0.0)
        return float(np.float32(self.limit / reach if reach else math.inf))

    def _factors(
        self, graph: ir.Graph, quantize: ir.Node, activation: ScaleTable | TokenScale, greatest: float
    ) -> tuple[np.float32, ir.Value, ir.Value]:
        """(c, c / s, s / c)."""
        label, scale = f"{SITE.read(quantize)}.activation", quantize.inputs[1]
        producer = scale.producer() if scale is not None else None
        if isinstance(activation, TokenScale):
            assert producer is not None
            constant_scale = min(activation.constant, greatest)
            return np.float32(constant_scale), *_token_factors(graph, label, producer, activation, constant_scale)
        table = activation.scale if producer is None else activation.resample(self.result.bins()).scale
        largest = np.float32(min(float(table.max()), greatest))
        readers = [user for dequantize, _ in quantize.outputs[0].uses() for user, _ in dequantize.outputs[0].uses()]
        rank = 4 if any(user.op_type == "Conv" for user in readers) else 3
        before = _table_factor(graph, producer, f"{label}_before", largest / table, rank)
        return largest, before, _table_factor(graph, producer, f"{label}_after", table / largest, rank)


def _factor(graph: ir.Graph, pair: tuple[ir.Node, ir.Node], largest: np.float32, before: ir.Value, after: ir.Value) -> None:
    """Give Q and DQ the constant scale, and multiply their input by `before` and the GEMMs' results by `after`."""
    quantize, dequantize = pair
    label = f"{SITE.read(quantize)}.activation"
    scale = initializer(graph, f"{label}_constant_scale", np.asarray(largest))
    codes, source = quantize.outputs[0].dtype, quantize.inputs[0]
    assert codes is not None
    assert source is not None
    zero = initializer(graph, f"{label}_zero_point", np.asarray(0, dtype=codes.numpy()))
    scaled = ir.node("Mul", [source, before])
    like(scaled.outputs[0], source)
    graph.insert_before(quantize, scaled)
    quantize.replace_input_with(0, scaled.outputs[0])
    for node in pair:
        node.resize_inputs(3)
        node.replace_input_with(1, scale)
        node.replace_input_with(2, zero)
        for attribute in ("axis", "block_size", "output_dtype"):
            node.attributes.pop(attribute, None)
    for matmul in [user for user, _ in dequantize.outputs[0].uses()]:
        if matmul.op_type == "Conv" and len(matmul.inputs) > 2:
            _detach_bias(graph, matmul)
        result = matmul.outputs[0]
        restored = ir.node("Mul", [result, after])
        FACTOR.write(restored, str(matmul.name))
        like(restored.outputs[0], result)
        graph.insert_after(matmul, restored)
        redirect(result, restored.outputs[0])


def _detach_bias(graph: ir.Graph, convolution: ir.Node) -> None:
    """Conv(x, W, b)  ->  Conv(x, W) + b[N, 1, 1]."""
    bias, result = stored(convolution.inputs[2]), convolution.outputs[0]
    assert bias is not None
    shape = (*bias.shape.numpy(), 1, 1)
    name = f"{convolution.name}.added_bias"
    column = computed_initializer(graph, name, bias.dtype, shape, lambda: bias.numpy().reshape(shape))
    convolution.resize_inputs(2)
    add = ir.node("Add", [result, column], metadata_props=dict(convolution.metadata_props))
    like(add.outputs[0], result)
    graph.insert_after(convolution, add)
    redirect(result, add.outputs[0])


def _table_factor(graph: ir.Graph, gather: ir.Node | None, name: str, table: Float32, rank: int) -> ir.Value:
    """Gather(table, bin): a scalar, or [B, 1, 1 …] of rank `rank` if the bin is [B]; a constant if there is no bin."""
    if gather is None:
        return initializer(graph, f"{name}_factor", table.reshape(()))
    index = gather.inputs[1]
    rows = initializer(graph, f"{name}_table", table)
    node = ir.node("Gather", [rows, index], attributes={"axis": 0}, name=name)
    like(node.outputs[0], rows)
    node.outputs[0].shape = index.shape if index is not None else None
    nodes = [node]
    if index is not None and index.shape is not None and len(index.shape) == 1:
        axes = initializer(graph, f"{name}_axes", np.arange(1, rank, dtype=np.int64))
        nodes.append(ir.node("Unsqueeze", [node.outputs[0], axes]))
    graph.insert_after(gather, nodes)
    return nodes[-1].outputs[0]


def _token_factors(graph: ir.Graph, label: str, unit: ir.Node, token: TokenScale, largest: float) -> tuple[ir.Value, ir.Value]:
    """c / s and s / c of s = amax * (clip / qmax), each rounded once.

    Args:
        unit: the Mul that computes s from amax.
    """
    amax = unit.inputs[0]
    assert amax is not None
    reach, clip = np.float32(largest * token.qtype.qmax), np.float32(token.clip)
    before = ir.node("Div", [initializer(graph, f"{label}_token_range", np.asarray(reach / clip)), amax])
    after = ir.node("Mul", [amax, initializer(graph, f"{label}_token_unit", np.asarray(clip / reach))])
    for node in (before, after):
        like(node.outputs[0], unit.outputs[0])
    graph.insert_after(unit, [before, after])
    return before.outputs[0], after.outputs[0]
