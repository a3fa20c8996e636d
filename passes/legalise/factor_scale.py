"""Turn run-time scales into constant ones: the factored form, for backends whose Q/DQ need constants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..base import GraphPass, PassReport, constant, initializer, like, redirect
from ..match import STAMP_FACTOR, module_of


@dataclass(frozen=True, kw_only=True)
class FactorScale(GraphPass):
    """x -> Q(s[t]) -> DQ(s[t]) -> MatMul  ->  x * (c / s[t]) -> Q(c) -> DQ(c) -> MatMul -> * (s[t] / c), c = max of the table.

    A scalar commutes with the GEMM, so the codes are the same. With a timestep per sample the factors are [B, 1, 1].
    c is not 1: with c of the activations' size a float16 GEMM result stays in range. TensorRT's GEMMs put out c times the
    sum of products of codes, the weight's scales come behind: with `limit` c is as small as that needs.

    It does not act where
        1. the scale is a constant already, and within the limit,
        2. the scale is not a Gather from a constant table,
        3. the dequantized value feeds anything but the first input of MatMuls.

    Args:
        reach: by module, a bound of |sum of products of codes| of its GEMM.
        limit: what c times that may be at most.

    Exactness: reorders float operations: x * (c / s) / c in place of x / s, so a value within 2^-22 of a rounding
    boundary may get the neighbouring code; all else is equal to float32 rounding.
    """

    name: ClassVar[str] = "factor_scale"
    reach: Mapping[str, float] = field(default_factory=dict)
    limit: float = math.inf

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
            scale = quantize.inputs[1]
            dequantize = next(iter(quantize.outputs[0].uses()))[0]
            readers = [user for user, _ in dequantize.outputs[0].uses()]
            greatest = self._greatest(readers)
            fixed = constant(scale)
            if scale is None or (fixed is not None and fixed.max() <= np.float32(greatest)):
                continue
            gather = scale.producer()
            table = constant(gather.inputs[0]) if gather is not None and gather.op_type == "Gather" else fixed
            if table is None:
                skipped.append(f"'{quantize.name}': its scale is no Gather from a constant table (case 2)")
            elif not all(user.op_type == "MatMul" for user in readers):
                skipped.append(f"'{quantize.name}': read by more than MatMuls (case 3)")
            else:
                wide = table.astype(np.float32, copy=False).reshape(-1)
                _factor(model.graph, quantize, dequantize, gather, wide, min(wide.max(), np.float32(greatest)))
                changed.append(f"'{quantize.name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))

    def _greatest(self, readers: Sequence[ir.Node]) -> float:
        """The greatest c that keeps every reader's GEMM within the limit."""
        reach = max((self.reach.get(module_of(node), 0.0) for node in readers), default=0.0)
        return self.limit / reach if reach else math.inf


def _factor(
    graph: ir.Graph,
    quantize: ir.Node,
    dequantize: ir.Node,
    gather: ir.Node | None,
    table: npt.NDArray[np.float32],
    largest: np.float32,
) -> None:
    label = str(quantize.name).removesuffix("_q")
    before = _factor_of(graph, gather, f"{label}_before", (largest / table).astype(np.float32))
    after = _factor_of(graph, gather, f"{label}_after", (table / largest).astype(np.float32))
    scale = initializer(graph, f"{label}_constant_scale", np.asarray(largest))
    codes = quantize.outputs[0].dtype
    assert codes is not None
    zero = initializer(graph, f"{label}_zero_point", np.asarray(0, dtype=codes.numpy()))
    source = quantize.inputs[0]
    assert source is not None
    scaled = ir.node("Mul", [source, before])
    like(scaled.outputs[0], source)
    graph.insert_before(quantize, scaled)
    quantize.replace_input_with(0, scaled.outputs[0])
    for node in (quantize, dequantize):
        node.replace_input_with(1, scale)
        node.replace_input_with(2, zero)
        node.attributes.pop("axis", None)
    for matmul in [user for user, _ in dequantize.outputs[0].uses()]:
        result = matmul.outputs[0]
        restored = ir.node("Mul", [result, after], metadata_props={STAMP_FACTOR: str(matmul.name)})
        like(restored.outputs[0], result)
        graph.insert_after(matmul, restored)
        redirect(result, restored.outputs[0])


def _factor_of(graph: ir.Graph, gather: ir.Node | None, name: str, table: npt.NDArray[np.float32]) -> ir.Value:
    """Gather(table, bin): a scalar, or [B, 1, 1] where the bin is [B]; a constant where there is no bin."""
    if gather is None:
        return initializer(graph, f"{name}_factor", table.reshape(()))
    index = gather.inputs[1]
    stored = initializer(graph, f"{name}_table", table)
    node = ir.node("Gather", [stored, index], attributes={"axis": 0}, name=name)
    nodes = [node]
    if index is not None and index.shape is not None and len(index.shape) == 1:
        axes = initializer(graph, f"{name}_axes", np.asarray([1, 2], dtype=np.int64))
        nodes.append(ir.node("Unsqueeze", [node.outputs[0], axes]))
    graph.insert_after(gather, nodes)
    return nodes[-1].outputs[0]
