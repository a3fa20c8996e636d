"""Audit and parity of an output folder against what its recipe requires."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from dq_export.calibration.recipe import Rule
from dq_export.deploy.audit import Audit, Gemm
from dq_export.deploy.backend import Backend
from dq_export.deploy.parity import FLOAT_SQNR, CallParity, Difference, require

from .report import AuditReport, GemmReport, ParityReport


def audit_engine(backend: Backend, model: Path, engine: Path, assigned: Mapping[str, Rule]) -> AuditReport:
    """See `Backend.audit`."""
    audit = backend.audit(model, engine, assigned)
    gemms = [GemmReport(**asdict(gemm)) for gemm in audit.gemms]
    return AuditReport(coverage=audit.coverage, integer_share=audit.integer_share, gemms=gemms)


def require_audit(report: AuditReport, threshold: float) -> None:
    """See `Audit.require`."""
    Audit(gemms=tuple(Gemm(**gemm.model_dump()) for gemm in report.gemms)).require(threshold)


def require_parity(report: ParityReport, floor: float) -> None:
    """Every stage's worst call must keep its floor: 80 dB for the float graph, the recipe's for the others.

    Raises:
        ParityError: see `parity.require`.
    """
    rows = [
        CallParity(
            stage=call.stage,
            timestep=call.timestep,
            bin=call.bin,
            difference=Difference(sqnr=call.sqnr, cosine=call.cosine, max_error=call.max_error),
        )
        for call in report.calls
    ]
    stages = dict.fromkeys(row.stage for row in rows)
    require(rows, {stage: FLOAT_SQNR if stage == "float-onnx" else floor for stage in stages})
