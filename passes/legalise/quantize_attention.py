"""Attention's two matmuls in float8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dq_export.core.qtypes import FP8

from ..analysis.bounds import bound
from ..base import GraphPass, PassReport, initializer, like
from ..match import element_type, module_of, only_user


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizeAttention(GraphPass):
    """MatMul(q, k) -> Softmax -> MatMul(p, v)  ->  the same with Q/DQ float8 at q, k, p and v.

    Scales are constants: a type with an exponent loses no precision if a timestep's values are ten times smaller. The scale of
    p is 1 / 448, because no probability exceeds 1. Query and key are quantized after their factor 1 / sqrt(sqrt(head)). The
    heads of joint attention come from several linears, and may be normalized and rotated: see `bound`.

    It does not act where
        1. no bound of query, key or value follows from the linears that have a scale,
        2. they are already quantized.

    Exactness: lossy by design; 3 bits of mantissa.
    Source: the placement of NVIDIA's Model-Optimizer; TensorRT fuses no other placement (both operands of both matmuls).

    Args:
        scales: by module name of the linears that make query, key and value: their greatest |result| / 448.
    """

    name: ClassVar[str] = "quantize_attention"
    # The Mul after a GEMM would hide the linear that produces the heads.
    before: ClassVar[tuple[str, ...]] = ("factor_scale",)
    scales: Mapping[str, float]

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        greatest = {
            output: self.scales[module_of(node)] * FP8.qmax
            for node in model.graph
            if module_of(node) in self.scales
            for output in node.outputs
        }
        for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
            scores = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
            product = only_user(softmax.outputs[0])
            if product is not None and product.op_type == "QuantizeLinear":
                continue
            if scores is None or product is None or {scores.op_type, product.op_type} != {"MatMul"}:
                skipped.append(f"'{softmax.name}': not between two matmuls (case 1)")
                continue
            scales = [_scale(value, greatest) for value in (*scores.inputs, product.inputs[1])]
            if None in scales:
                skipped.append(f"'{softmax.name}': no bound of its operands follows from linears with a scale (case 1)")
                continue
            label = str(softmax.name)
            q, k, v = (float(scale or 0.0) for scale in scales)
            for node, index, name, scale in (
                (scores, 0, "query", q),
                (scores, 1, "key", k),
                (product, 0, "probability", 1 / FP8.qmax),
                (product, 1, "value", v),
            ):
                _insert(model.graph, node, index, f"{label}.{name}", scale)
            changed.append(f"'{softmax.name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _scale(value: ir.Value | None, linears: Mapping[ir.Value, float]) -> float | None:
    greatest = bound(value, linears)
    return None if greatest is None else greatest / FP8.qmax


def _insert(graph: ir.Graph, node: ir.Node, index: int, name: str, scale: float) -> None:
    source = node.inputs[index]
    assert source is not None
    dtype = element_type(FP8)
    step = initializer(graph, f"{name}_scale", np.asarray(scale, dtype=np.float32))
    zero = initializer(graph, f"{name}_zero_point", np.asarray(0, dtype=dtype.numpy()))
    quantize = ir.node("QuantizeLinear", [source, step, zero], name=f"{name}_q")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], step, zero], name=f"{name}_dq")
    like(dequantize.outputs[0], source)
    dequantize.outputs[0].dtype = ir.DataType.FLOAT
    quantize.outputs[0].dtype, quantize.outputs[0].shape = dtype, source.shape
    graph.insert_before(node, [quantize, dequantize])
    node.replace_input_with(index, dequantize.outputs[0])
