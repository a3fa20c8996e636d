"""From the float graph's file to the quantized graph's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from dq_export.calibration.artifacts import CalibrationResult
from dq_export.calibration.recipe import Rule
from dq_export.passes.base import GraphPass, PassReport, run_passes
from dq_export.passes.pipeline import canonical_passes

IR_VERSION = 10
"""What opset 21 needs; ONNX Runtime 1.31 loads up to 13, while the exporter may write a later one."""


def quantize_graph(
    source: Path,
    target: Path,
    calibration: CalibrationResult,
    assigned: Mapping[str, Rule],
    legalise: tuple[GraphPass, ...],
    *,
    stop_after: str = "",
) -> list[PassReport]:
    """Apply the canonical passes and a backend's; weights go to `<target>.data`, small constants stay in the graph.

    The float weights are memory-mapped, so they are never held twice.

    Args:
        stop_after: the pass behind which to stop, to find by bisection the one that broke parity.
    """
    model = ir.load(source)
    model.ir_version = IR_VERSION
    reports = run_passes(model, (*canonical_passes(calibration, assigned), *legalise), stop_after=stop_after)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=1024)
    return reports
