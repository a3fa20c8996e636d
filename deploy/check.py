"""What a backend will do with each quantized GEMM of an ONNX file, before it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from .chain import chain_of
from .rules import RULES, Verdict

Target = Literal["trt", "trt-rtx", "ort"]
GEMMS = ("MatMul", "Gemm", "Conv")
INTEGER_OPERATORS = frozenset(
    {"MatMulInteger", "QLinearMatMul", "DynamicQuantizeLinear", "ConvInteger", "QLinearConv", "MatMulNBits"}
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What happens to one quantized node.

    Args:
        node: its name.
        verdict: `rejected`: parser or builder refuse it, or build something with other numbers; `float`: it builds, and the
            GEMM runs on floats; `low precision`: the kernel multiplies the codes, or unpacks int4 inside.
        rule: why; empty where it is as it should be.
        fix: what to change.
        weight_only: float, and meant so, as far as can be seen: only the weight is quantized.
    """

    node: str
    verdict: Verdict
    rule: str = ""
    fix: str = ""
    weight_only: bool = False

    @property
    def failed(self) -> bool:
        """Whether somebody should look at it."""
        return self.verdict == "rejected" or (self.verdict == "float" and not self.weight_only)


def check(model: ir.Model, target: Target, compute: Sequence[str] = ()) -> list[Finding]:
    """A verdict for every GEMM that reads a DequantizeLinear, and for every operator that the target does not know.

    Rules for `trt-rtx` were read off TensorRT-RTX 1.7's own builds, those for `trt` are the same plus what NVIDIA's pages
    forbid (scales that are not constants); `ort` is ONNX Runtime's CPU provider. No weight is read.

    Args:
        compute: for trt-rtx, the targets: sm75 … sm121.
    """
    findings = []
    for node in model.graph:
        if node.op_type in INTEGER_OPERATORS and target != "ort":
            findings.append(
                Finding(
                    node=str(node.name),
                    verdict="rejected",
                    rule=f"{node.op_type} is not imported",
                    fix="write QuantizeLinear, DequantizeLinear and MatMul",
                )
            )
        if node.op_type not in GEMMS:
            continue
        left, right = chain_of(node.inputs[0]), chain_of(node.inputs[1])
        if left is None and right is None:
            continue
        rules = RULES[target]
        found = next((item for rule in rules if (item := rule(node, left, right, compute)) is not None), None)
        verdict, why, fix = found or ("low precision", "", "")
        findings.append(Finding(node=str(node.name), verdict=verdict, rule=why, fix=fix, weight_only=left is None))
    return findings
