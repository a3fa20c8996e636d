"""The stage `audit`: which kernels the engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_export.deploy.audit import Audit

from ..finished_folder import engine_of
from ..ledger import Result
from .build import BUILD
from .stage import Context, Stage


class Audited(Result):
    """What the engine runs."""

    audit: Audit


@dataclass(frozen=True)
class AuditEngine(Stage[Audited]):
    """Reads off the built engine which GEMMs run on low-precision kernels."""

    name: str = "audit"
    result: type[Audited] = Audited
    needs: tuple[Stage[Any], ...] = (BUILD,)

    def applies(self, context: Context) -> bool:
        """Where an engine was built."""
        return BUILD in context.results

    def text(self, context: Context) -> str:
        """What it reads."""
        return "kernels of the engine"

    def also(self, context: Context) -> dict[str, Any]:
        """What the rules decide, which the kernels are compared with."""
        return {"schemes": context.schemes}

    def run(self, context: Context, target: Path) -> Audited:
        """Audit the engine; nothing is written."""
        assert context.backend is not None  # an engine was built
        audit = context.backend.audit(engine_of(context.folder), context.assigned)
        return Audited(summary=f"{audit.coverage:.1%} of the quantized FLOPs in low precision", audit=audit)


AUDIT = AuditEngine()
