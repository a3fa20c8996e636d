"""The tables that commands print. Used by the command line alone."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:  # they load numpy and pydantic, which --help does without
    from dq_export.deploy.check import Finding
    from dq_export.deploy.triton.model_folder import Fault

    from .exploration import Outcome
    from .report import AuditReport, LatencyReport, Report


def print_search(found: Outcome) -> None:
    """The winner beside the recipes with one choice everywhere."""
    table = Table("", "MB", "ms", "dB", title="trajectories of other noise and labels than the search's")
    for name, size, taken, sqnr in (("found", found.size, found.milliseconds, found.held_back), *found.uniform):
        table.add_row(name, f"{size:.2f}", "" if math.isnan(taken) else f"{taken:.2f}", f"{sqnr:.1f}")
    Console().print(table)


def print_audit(report: AuditReport, required: float) -> None:
    """The kernel of every GEMM."""
    table = Table("GEMM", "wanted", "kernel", "why not")
    for gemm in report.gemms:
        table.add_row(gemm.name, gemm.wanted, gemm.kernel, gemm.reason)
    Console().print(table)
    print(f"{report.coverage:.1%} of the quantized GEMMs' FLOPs run on low-precision kernels; required {required:.1%}")


def print_latency(latency: LatencyReport) -> None:
    """Every engine's latency and memory, and the operators that take longest."""
    table = Table("", "median ms", "least", "engine is faster by", "memory MB", title=f"one call, batch {latency.batch}")
    for name, item in latency.engines.items():
        ratio = f"{item.median_ms / latency.engine_ms:.2f}x"
        table.add_row(name, f"{item.median_ms:.2f}", f"{item.least_ms:.2f}", ratio, f"{item.memory_mb or 0:.0f}")
    Console().print(table)
    print(f"float: {latency.baseline}; each engine in processes of its own, in turn")
    operators = Table("operator", "float ms", "engine ms")
    before, after = latency.profile["float"], latency.profile["engine"]
    longest = sorted({*before, *after}, key=lambda name: -max(before.get(name, 0), after.get(name, 0)))
    for name in [name for name in longest if max(before.get(name, 0), after.get(name, 0)) >= 0.01 * latency.engine_ms]:
        operators.add_row(name, f"{before.get(name, 0):.2f}", f"{after.get(name, 0):.2f}")
    Console().print(operators)
    for name, reason in latency.skipped.items():
        print(f"without {name}: {reason}")


def print_findings(findings: Sequence[Finding]) -> None:
    """What a target will not run in low precision, and how many GEMMs of each verdict there are."""
    table = Table(Column("node", overflow="fold"), "verdict", "why", "what to do")
    for item in [item for item in findings if item.verdict != "low precision"]:
        table.add_row(item.node, item.verdict, item.rule, item.fix)
    if table.row_count:
        Console().print(table)
    counted = Counter(item.verdict for item in findings)
    print(", ".join(f"{counted[verdict]} {verdict}" for verdict in ("low precision", "float", "rejected")))


def print_faults(faults: Sequence[Fault]) -> None:
    """What is wrong with a model repository, and how many errors and warnings there are."""
    table = Table("model", "", Column("what", overflow="fold"), "what to do")
    for item in faults:
        table.add_row(item.model, item.severity, item.what, item.fix)
    if faults:
        Console().print(table)
    counted = Counter(item.severity for item in faults)
    print(", ".join(f"{counted[severity]} {severity}s" for severity in ("error", "warning")))


def summarize(report: Report, folder: Path, *, verbose: bool) -> None:
    """Print the closing table; `verbose` adds what each pass changed and how long each stage took."""
    from .repository import REPOSITORY

    table = Table(title=f"{report.model} -> {folder}", show_header=False)
    if report.audit:
        table.add_row("low-precision kernels", f"{report.audit.coverage:.1%} of the quantized GEMMs' FLOPs")
        table.add_row("", f"{report.audit.integer_share:.1%} of all GEMM FLOPs (attention and skipped linears included)")
    drawn = {row.stage: f"; pictures {row.sqnr:.1f} dB" for row in (report.parity.trajectories if report.parity else ())}
    for stage in report.stages():
        low = report.worst_call(stage)
        assert low is not None  # stages are those that have calls
        calls = f"calls {report.mean_sqnr(stage):.1f} dB mean, {low.sqnr:.1f} worst (t={low.timestep:g})"
        table.add_row(f"SQNR {stage}", calls + drawn.get(stage, ""))
    if report.size:
        size = report.size
        ratio = size.float_bytes / size.engine_bytes
        table.add_row("size", f"{size.float_bytes / 1e6:.1f} -> {size.engine_bytes / 1e6:.1f} MB ({ratio:.2f}x smaller)")
    if report.latency:
        speed = report.latency
        table.add_row(
            f"latency, batch {speed.batch}", f"float {speed.float_ms:.2f} ms, engine {speed.engine_ms:.2f} ms: {speed.ratio:.2f}x"
        )
    for reason, count in report.skipped():
        table.add_row("not quantized", f"{count} linears, {reason}")
    for line in report.passes if verbose else ():
        table.add_row("pass", line)
    for stage, seconds in report.seconds.items() if verbose else ():
        table.add_row("seconds", f"{stage}: {seconds}")
    Console().print(table)
    print(f"report: {folder / 'report.html'}")
    if (folder / REPOSITORY / "README.md").exists():
        print(f"Triton model repository: {folder / REPOSITORY} (README.md there)")
    if report.latency:
        warn_if_slower(report.latency)


def warn_if_slower(latency: LatencyReport) -> None:
    """Say on stderr which operators lose, where the float graph is the faster one."""
    from .speed import losing

    if latency.ratio < 1:
        lost = ", ".join(losing(latency)[:5]) or "`dq-export bench OUT` lists them"
        slower = f"the quantized engine is {1 / latency.ratio:.2f}x slower than {latency.baseline}"
        print(f"warning: {slower}; operators that lose: {lost}", file=sys.stderr)
