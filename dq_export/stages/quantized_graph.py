"""From the float graph's file to the quantized graph's file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.documents import shown_path
from dq_export.core.recipe import Rule
from dq_export.passes.base import GraphError, GraphPass, PassReport, run_passes
from dq_export.passes.pipeline import canonical_passes

from ..families.float_graph import DAMAGED, load

IN_FLIGHT = 128 << 20
"""Bytes of rewritten weights in memory at once."""
IR_VERSION = 10
"""What opset 21 needs; ONNX Runtime 1.31 loads up to 13, while the exporter may write a later one."""


def quantize_graph(
    source: Path,
    target: Path,
    calibration: CalibrationResult,
    assigned: Mapping[str, Rule],
    legalise: tuple[GraphPass, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    stop_after: str = "",
) -> list[PassReport]:
    """Apply the canonical passes and a backend's; weights go to `<target>.data`, small constants stay in the graph.

    The float weights are memory-mapped and rewritten a few at a time, when they are saved.

    Args:
        progress: called with (weights written, weights in all).
        stop_after: the pass behind which to stop, to find by bisection the one that broke parity.

    Raises:
        GraphError: the float graph is damaged.
    """
    model = load(source)
    model.ir_version = IR_VERSION
    reports = run_passes(model, (*canonical_passes(calibration, assigned), *legalise), stop_after=stop_after)
    try:
        ir.save(
            model,
            target,
            external_data=f"{target.name}.data",
            size_threshold_bytes=1024,
            callback=lambda tensor, info: progress(info.index, info.total),
            max_workers=os.cpu_count(),
            max_in_flight_bytes=IN_FLIGHT,
        )
    except ir.serde.SerdeError as error:  # a text that is no UTF-8, which onnx_ir reads and does not write
        raise GraphError(f"{shown_path(source)}: {DAMAGED}") from error
    return reports
