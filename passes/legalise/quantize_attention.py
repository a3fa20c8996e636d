"""Attention's two matmuls in float8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dq_export.core.qtypes import FP8

from ..base import GraphPass, PassReport, initializer, like
from ..match import element_type, module_of, only_user
from .fuse_attention import split_source, unscaled, untransposed


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizeAttention(GraphPass):
    """MatMul(q, k) -> Softmax -> MatMul(p, v)  ->  the same with Q/DQ float8 at q, k, p and v.

    Scales are constants: a type with an exponent loses no precision if a timestep's values are ten times smaller. The scale of
    p is 1 / 448, because no probability exceeds 1. Query and key are quantized after their factor 1 / sqrt(sqrt(head)).

    It does not act where
        1. query, key or value are not heads split from a linear that has a scale,
        2. they are already quantized.

    Exactness: lossy by design; 3 bits of mantissa.
    Source: the placement of NVIDIA's Model-Optimizer; TensorRT fuses no other placement (both operands of both matmuls).

    Args:
        scales: by module name of the query, key and value projections.
    """

    name: ClassVar[str] = "quantize_attention"
    # The Mul after a GEMM would hide the linear that produces the heads.
    before: ClassVar[tuple[str, ...]] = ("factor_scale",)
    scales: Mapping[str, float]

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
            scores = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
            product = only_user(softmax.outputs[0])
            if product is not None and product.op_type == "QuantizeLinear":
                continue
            if scores is None or product is None or {scores.op_type, product.op_type} != {"MatMul"}:
                skipped.append(f"'{softmax.name}': not between two matmuls (case 1)")
                continue
            (query, first), (key, second) = unscaled(scores.inputs[0]), unscaled(scores.inputs[1])
            sources = (split_source(query), split_source(untransposed(key)), split_source(product.inputs[1]))
            scales = [self._scale(source) for source in sources]
            if None in scales:
                skipped.append(f"'{softmax.name}': its operands are not heads of linears with a scale (case 1)")
                continue
            label = str(softmax.name)
            q, k, v = (float(scale or 0.0) for scale in scales)
            for node, index, name, scale in (
                (scores, 0, "query", q * first),
                (scores, 1, "key", k * second),
                (product, 0, "probability", 1 / FP8.qmax),
                (product, 1, "value", v),
            ):
                _insert(model.graph, node, index, f"{label}.{name}", scale)
            changed.append(f"'{softmax.name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))

    def _scale(self, source: ir.Value | None) -> float | None:
        producer = source.producer() if source is not None else None
        return self.scales.get(module_of(producer)) if producer is not None else None


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
