"""The stage `quantize`: from the float graph to the quantized graph."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.digest import file_digest
from dq_export.core.documents import shown_path
from dq_export.core.plugins import described_plugins
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe
from dq_export.passes.base import GraphError, GraphPass, PassReport, run_passes
from dq_export.passes.pipeline import canonical_passes, with_plugins

from ..families.float_graph import DAMAGED, load
from ..finished_folder import MODEL
from ..ledger import Result
from ..machine import versions
from ..report.report import SizeReport
from .calibrate import CALIBRATE
from .distill import DISTILL, decided
from .float_graph import FLOAT
from .stage import Context, Stage, folder_bytes

IN_FLIGHT = 128 << 20
"""Bytes of rewritten weights in memory at once."""
IR_VERSION = 10
"""What opset 21 needs; ONNX Runtime 1.31 loads up to 13, while the exporter may write a later one."""


class Quantized(Result):
    """What the passes did.

    Args:
        passes: what each changed, and what it left alone with the reason.
    """

    passes: tuple[PassReport, ...] = ()
    size: SizeReport


@dataclass(frozen=True)
class Quantize(Stage[Quantized]):
    """Runs the canonical passes and the backend's own on the float graph."""

    name: str = "quantize"
    result: type[Quantized] = Quantized
    fields: tuple[str, ...] = ("format", "provider")
    needs: tuple[Stage[Any], ...] = (FLOAT, CALIBRATE, DISTILL)

    def modules(self, recipe: Recipe) -> tuple[str, ...]:
        """ONNX Runtime, whose version decides what its graph may hold."""
        return ("onnxruntime",) if recipe.format == "ort" else ()

    def text(self, context: Context) -> str:
        """That it works on the graph."""
        return "passes on the graph"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The graph and its weights."""
        return (MODEL, f"{MODEL}.data")

    def also(self, context: Context) -> dict[str, Any]:
        """What the rules decide, the passes of plug-ins, and the float type for formats whose graph holds it.

        OpenVINO gets it when it compiles.
        """
        dtype = context.recipe.dtype if context.recipe.plan else None
        return {"schemes": context.schemes, "dtype": dtype, "passes": described_plugins("passes")}

    def run(self, context: Context, target: Path) -> Quantized:
        """Write `model.onnx`; no other stage loads the calibration, so its codes are in memory here alone."""
        source = context.folder / "float" / MODEL
        decisions = context.folder / decided(context.recipe)
        result = CalibrationResult.load(decisions)
        legalise = context.backend.legalise(shared=context.shared, result=result) if context.backend else ()
        passes = with_plugins((*canonical_passes(result, context.assigned), *legalise), result, context.assigned)
        origin = {"dq_export_checkpoint": context.reference.digest, "dq_export_calibration": file_digest(decisions)}
        reports = quantize_graph(source, target / MODEL, passes, context.progress.advance, origin)
        gc.collect()  # the graph ties its mapped weights into cycles
        size = SizeReport(float_bytes=folder_bytes(source.parent), engine_bytes=folder_bytes(target))
        return Quantized(
            summary=f"{size.float_bytes / 1e6:.1f} -> {size.engine_bytes / 1e6:.1f} MB",
            passes=tuple(reports),
            size=size,
        )


QUANTIZE = Quantize()


def quantize_graph(
    source: Path,
    target: Path,
    passes: Sequence[GraphPass],
    progress: Advance = unwatched,
    origin: Mapping[str, str] | None = None,
) -> list[PassReport]:
    """Apply passes to the float graph; weights go to `<target>.data`, small constants stay in the graph.

    The float weights are memory-mapped and rewritten a few at a time, when they are saved.

    Args:
        progress: called with (weights written, weights in all).
        origin: the graph's metadata: what it was made from.

    Raises:
        GraphError: the float graph is damaged.
    """
    model = load(source)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "dq-export", versions()["dq-export"]
    model.metadata_props.update(origin or {})
    reports = run_passes(model, passes)
    try:
        ir.save(
            model,
            target,
            external_data=f"{target.name}.data",
            size_threshold_bytes=1024,
            callback=lambda tensor, info: progress(info.index, info.total, "tensors"),
            max_workers=os.cpu_count(),
            max_in_flight_bytes=IN_FLIGHT,
        )
    except ir.serde.SerdeError as error:  # a text that is not UTF-8, which onnx_ir reads and does not write
        raise GraphError(f"{shown_path(source)}: {DAMAGED}") from error
    return reports
