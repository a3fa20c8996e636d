"""Add to each bias the mean error that quantization causes in the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult

from ..base import GraphPass, PassReport
from ..match import find_linear, linears
from ..names import CORRECTED


@dataclass(frozen=True, kw_only=True, eq=False)
class CorrectBias(GraphPass):
    """W x + b  ->  W x + (b + d), where d is the calibration's correction of the linear; inserts an Add if there was no bias.

    It does not act where
        1. calibration has no correction,
        2. the linear was corrected before (stamped on its GEMM).

    Exactness: as the float32 sum of b and d.

    Args:
        result: the corrections.
    """

    name: ClassVar[str] = "correct_bias"
    # The correction applies to the folded bias.
    after: ClassVar[tuple[str, ...]] = ("fold_scaling",)
    before: ClassVar[tuple[str, ...]] = ("quantize_weights",)
    result: CalibrationResult

    def rewrite(self, model: ir.Model) -> PassReport:
        by_name = linears(model) if self.result.correction else {}
        changed = []
        for name, correction in self.result.correction.items():
            linear = find_linear(by_name, name)
            if not CORRECTED.read(linear.gemm):
                linear.change_bias(lambda bias, d=correction: bias + d)  # type: ignore[misc]
                CORRECTED.write(linear.gemm, "yes")
                changed.append(f"'{name}'")
        return PassReport(name=self.name, changed=tuple(changed))
