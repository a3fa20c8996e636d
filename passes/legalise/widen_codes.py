"""Store int4 weights of two levels as the int8 codes that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..base import GraphPass, PassReport, computed_initializer, stored
from ..match import weight_codes


@dataclass(frozen=True, kw_only=True)
class WidenCodes(GraphPass):
    """Cast(int4 codes) [* multipliers] -> DequantizeLinear  ->  int8 codes -> DequantizeLinear.

    For builders that need the input of a DequantizeLinear as a stored tensor and fold no constants before it.

    It does not act where
        1. the codes of a DequantizeLinear are already stored as its input, or are not a weight.

    Exactness: bit-exact; each element of the weight takes 8 bits again.
    """

    name: ClassVar[str] = "widen_codes"
    after: ClassVar[tuple[str, ...]] = ("quantize_weights",)

    def rewrite(self, model: ir.Model) -> PassReport:
        changed = []
        for node in [item for item in model.graph if item.op_type == "DequantizeLinear"]:
            value = node.inputs[0]
            packed = weight_codes(value)
            if value is None or packed is None or stored(value) is not None:
                continue
            codes, multiplier = packed
            shape = tuple(codes.shape.numpy())

            def compute(codes: ir.TensorProtocol = codes, times: ir.TensorProtocol | None = multiplier) -> npt.NDArray[np.int8]:
                wide = codes.numpy().astype(np.int8)
                if times is None:
                    return wide
                blocks = times.numpy().astype(np.int8).reshape(-1, 1, wide.shape[1])
                return (wide.reshape(len(blocks), -1, wide.shape[1]) * blocks).reshape(wide.shape).astype(np.int8)

            name = f"{codes.name}_wide"
            node.replace_input_with(0, computed_initializer(model.graph, name, ir.DataType.INT8, shape, compute))
            changed.append(f"'{node.name}'")
        return PassReport(name=self.name, changed=tuple(changed))
