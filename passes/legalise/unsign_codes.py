"""Store activation codes as uint8 with zero point 128, the type that ONNX Runtime's CPU kernels fuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dq_export.core.qtypes import UINT8

from ..base import GraphPass, PassReport, constant, initializer


@dataclass(frozen=True, kw_only=True)
class UnsignCodes(GraphPass):
    """Q(s, int8 0) -> DQ(s, int8 0)  ->  Q(s, uint8 128) -> DQ(s, uint8 128).

    Every code moves up by 128; -128 … 127 becomes 0 … 255, so saturation is the same too. ONNX Runtime fuses no GEMM
    whose int8 DequantizeLinear feeds several MatMuls (query, key, value); with uint8 it fuses all.

    convolutions: whether the codes that a ConvInteger reads change, too. ONNX Runtime before 1.24 has its kernel for
    uint8 alone; later versions are faster with int8 activations.

    It does not act where
        1. the zero point is not an int8 constant of one element,
        2. the node quantizes per sample (several zero points): factor_scale comes first there,
        3. another operator than DequantizeLinear (or ConvInteger, with `convolutions`) reads the codes.

    Exactness: bit-exact.
    """

    name: ClassVar[str] = "unsign_codes"
    # A zero point for each sample becomes one.
    after: ClassVar[tuple[str, ...]] = ("insert_qdq", "factor_scale", "integer_convolutions")
    convolutions: bool = False

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        readers = {"DequantizeLinear", "ConvInteger"} if self.convolutions else {"DequantizeLinear"}
        shifted: ir.Value | None = None
        for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
            zero = constant(quantize.inputs[2] if len(quantize.inputs) > 2 else None)
            if zero is None or zero.size != 1:
                skipped.append(f"'{quantize.name}': its zero point is not one constant (cases 1, 2)")
            elif any(user.op_type not in readers for user, _ in quantize.outputs[0].uses()):
                skipped.append(f"'{quantize.name}': its codes are read as they are (case 3)")
            elif zero.dtype == np.int8:
                if shifted is None:
                    shifted = initializer(
                        model.graph, "activation_zero_point_uint8", np.asarray(UINT8.zero_point, dtype=np.uint8)
                    )
                codes = quantize.outputs[0]
                codes.dtype = ir.DataType.UINT8
                for node in (quantize, *(user for user, _ in codes.uses())):
                    # All three operators take the zero point of these codes as their third input.
                    node.replace_input_with(2, shifted)
                changed.append(f"'{quantize.name}'")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))
