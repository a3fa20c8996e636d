"""Store weights as integer codes and a DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.calibration.artifacts import CalibrationResult
from dq_export.calibration.qtypes import Blocked, PerAxis, QuantType
from dq_export.calibration.recipe import Rule

from .base import GraphError, GraphPass, PassReport, computed_initializer, initializer, stored
from .match import LinearNode, element_type, linears


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizeWeights(GraphPass):
    """MatMul(x, W)  ->  MatMul(x, DequantizeLinear(codes, scale, 0)).

    `w8a8` and `fp8`: int8 or float8e4m3fn[K, N], scale float32[N] at axis 1. `weight-only` and `w4a16`: int8 or
    int4[K, N], scale float32[K / block, N], blocks along axis 0. Codes are W / scale rounded to the nearest, ties to even,
    and clipped. Zero points are explicit: without them ONNX Runtime runs the GEMM in float.

    It does not act where
        1. the recipe leaves the linear float,
        2. the weight is stored as codes already.

    Exactness: lossy by design; each weight moves by at most scale / 2.

    Args:
        result: holds the scale of every quantized weight.
        assigned: the deciding rule of every linear.
    """

    name: ClassVar[str] = "quantize_weights"
    result: CalibrationResult
    assigned: Mapping[str, Rule]

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        for name, linear in linears(model).items():
            qtype = self.assigned[name].weight
            if qtype is None:
                skipped.append(f"'{name}': {self.assigned[name].reason or 'float in the recipe'} (case 1)")
            elif stored(linear.gemm.inputs[1]) is not None:
                _quantize(model.graph, linear, self.result.weight_scale[name], qtype)
                changed.append(f"'{name}' {self.assigned[name].action}")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _quantize(graph: ir.Graph, linear: LinearNode, scale: npt.NDArray[np.float32], qtype: QuantType) -> None:
    name, gemm, dtype = linear.name, linear.gemm, element_type(qtype)
    if gemm.op_type == "Gemm":
        raise GraphError(f"'{name}' is a Gemm; only a MatMul is quantized. Run pass lift_modulation before, or make it float")
    read, (width, depth) = linear.weight_reader(), linear.shape
    blocked = scale.ndim == 2
    block_size = depth // scale.shape[0] if blocked else 0
    granularity = Blocked(axis=0, block_size=block_size) if blocked else PerAxis(axis=1)
    expected = granularity.scale_shape((depth, width))
    if scale.shape != expected:
        raise GraphError(
            f"'{name}': expected scales {expected} for a weight {(depth, width)}, found {scale.shape}; calibrate again"
        )

    def compute() -> npt.NDArray[np.generic]:
        full = np.repeat(scale.T, block_size, axis=1) if blocked else scale[:, None]
        codes: npt.NDArray[np.generic] = qtype.round((read() / full).astype(np.float32, copy=False)).T.astype(dtype.numpy())
        return codes

    codes = computed_initializer(graph, f"{name}.weight_codes", dtype, (depth, width), compute)
    steps = initializer(graph, f"{name}.weight_scale", scale)
    zero = initializer(graph, f"{name}.weight_zero_point", np.zeros(scale.shape, dtype=dtype.numpy()))
    attributes = {"axis": 0, "block_size": block_size} if blocked else {"axis": 1}
    node = ir.node("DequantizeLinear", [codes, steps, zero], attributes=attributes, name=f"{name}.weight_dq")
    node.outputs[0].shape, node.outputs[0].dtype = ir.Shape((depth, width)), ir.DataType.FLOAT
    graph.insert_before(gemm, node)
    gemm.replace_input_with(1, node.outputs[0])
