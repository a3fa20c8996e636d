"""The tables that commands print. Only the command line uses them."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:  # they load numpy and pydantic, which --help does without
    from dq_export.deploy.audit import Audit
    from dq_export.deploy.check import Finding
    from dq_export.deploy.triton.model_folder import Fault

    from ..bisection.bisect import Bisection
    from ..doctor import Diagnosis
    from ..report.comparison import Comparison
    from ..report.report import LatencyReport, Report
    from ..search.explore import Outcome
    from ..verification import Verification

CELL = 2000
"""The greatest number of characters of a cell."""


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a table. Text in a cell is not read as rich's markup, and its control characters are escaped.

    Args:
        heads: titles of the columns; if all are empty, the table has no head.
    """
    columns = [Column(head, overflow="fold") for head in heads]
    table = Table(*columns, title=one_line(title) if title else None, show_header=any(heads))
    for row in rows:
        table.add_row(*map(one_line, row))
    Console(markup=False, emoji=False, highlight=False).print(table)


def one_line(value: object) -> str:
    """A value as a line without control characters."""
    from dq_export.core.documents import printable

    return printable(str(value), CELL)


def print_search(outcome: Outcome) -> None:
    """Print the winner beside the recipes with one choice everywhere."""
    rows = [
        (name, f"{size:.2f}", "" if math.isnan(milliseconds) else f"{milliseconds:.2f}", f"{sqnr:.1f}")
        for name, size, milliseconds, sqnr in (("found", outcome.size, outcome.milliseconds, outcome.held_back), *outcome.uniform)
    ]
    print_table(["", "MB", "ms", "dB"], rows, title="trajectories of other noise and conditions than the search's")


def print_audit(report: Audit, required: float) -> None:
    """Print the kernel of every GEMM."""
    rows = [(gemm.name, gemm.wanted, gemm.kernel, gemm.reason) for gemm in report.gemms]
    print_table(["GEMM", "wanted", "kernel", "why not"], rows)
    print(f"{report.integer_share:.1%} of all GEMM FLOPs run on low-precision kernels;")
    print(f"{report.coverage:.1%} of the quantized GEMMs', required {required:.1%}")


def print_bisection(bisection: Bisection) -> None:
    """Print the worst recorded call after each pass, and where parity breaks."""
    rows = [(step.name, f"{step.sqnr:.1f}", step.call) for step in bisection.steps]
    print_table(["after", "worst dB", "of call"], rows)
    if bisection.broken is None:
        print(f"every call keeps {bisection.limit:g} dB after every pass")
        return
    place = f", at linear {one_line(bisection.linear)}" if bisection.linear else ""
    print(f"parity breaks in pass {bisection.broken.name}{place}")
    print(f"the worst call has {bisection.broken.sqnr:.1f} dB, required {bisection.limit:g}")
    if bisection.command:
        print(f"the failing part is in bisect/; this shows it, run in the output folder:\n{bisection.command}")
    else:
        print("no linear's result shows it: the error adds up, or is outside of linears")


def print_linears(report: Report, name: str) -> None:
    """Print all about the linear of that name, or a few lines for each whose name contains it, or for all if none does."""
    from ..report.explain import explain_linear, linear_lines

    exact = next((linear for linear in report.linears if linear.name == name), None)
    if exact is not None:
        print_table(["", ""], explain_linear(report, exact).items())
        return
    for lines in linear_lines(report, name) or linear_lines(report, ""):
        print("\n  ".join(map(one_line, lines)))


def print_verification(verification: Verification) -> None:
    """Print whether the recorded calls keep the limit, by the worst of them."""
    sqnr, timestep = verification.worst
    print(f"verify     {'passed' if verification.passed else 'FAILED'}")
    print(f"worst call {sqnr:.1f} dB at timestep {timestep:g}, of {len(verification.calls)} calls")
    print(f"limit      {verification.limit:.1f} dB ({verification.origin})")


def print_latency(latency: LatencyReport) -> None:
    """Print every engine's latency and memory, and the operators that take longest."""
    times = []
    for name, item in latency.engines.items():
        ratio = f"{item.median_ms / latency.engine_ms:.2f}x"
        times.append((name, f"{item.median_ms:.2f}", f"{item.least_ms:.2f}", ratio, f"{item.memory_mb or 0:.0f}"))
    heads = ["", "median ms", "least", "engine is faster by", "memory MB"]
    print_table(heads, times, title=f"one call, batch {latency.batch}")
    print(f"float: {latency.baseline}; each engine in its own processes, in turn")
    before, after = latency.profile["float"], latency.profile["engine"]
    longest = sorted({*before, *after}, key=lambda name: -max(before.get(name, 0), after.get(name, 0)))
    names = [name for name in longest if max(before.get(name, 0), after.get(name, 0)) >= 0.01 * latency.engine_ms]
    operators = [(name, f"{before.get(name, 0):.2f}", f"{after.get(name, 0):.2f}") for name in names]
    print_table(["operator", "float ms", "engine ms"], operators)
    for name, reason in latency.skipped.items():
        print(f"without {name}: {one_line(reason)}")


def print_findings(findings: Sequence[Finding]) -> None:
    """Print what a target will not run in low precision, and the numbers of GEMMs and of other operators by verdict."""
    gemms = [item for item in findings if item.gemm or item.failed]
    rows = [(item.node, item.verdict, item.rule, item.fix) for item in gemms if item.verdict != "low precision"]
    if rows:
        print_table(["node", "verdict", "why", "what to do"], rows)
    counts: Counter[str] = Counter(item.verdict for item in gemms)
    verdicts = ["low precision", "float", "rejected", *(["unknown"] if counts["unknown"] else [])]
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in verdicts))
    others = Counter(item.verdict for item in findings if not item.gemm and not item.failed)
    if others:
        print("beside GEMMs:", ", ".join(f"{count} operators in {verdict}" for verdict, count in others.items()))
    if not findings:
        print("the file holds no quantized operator")


def print_comparison(comparison: Comparison) -> None:
    """Print each table of two exports side by side."""
    for title, rows in comparison.tables().items():
        print_table(["", *comparison.names], rows, title=title)


def print_diagnosis(parts: Sequence[Diagnosis]) -> None:
    """Print each part of the machine, and how to add what is missing."""
    rows = [(item.part, item.state, item.purpose, item.remedy) for item in parts]
    print_table(["part", "here", "what it is for", "how to add it"], rows)


def print_faults(faults: Sequence[Fault]) -> None:
    """Print the faults of a model repository, and the numbers of errors and warnings."""
    if faults:
        rows = [(item.model, item.severity, item.problem, item.fix) for item in faults]
        print_table(["model", "", "what", "what to do"], rows)
    counts = Counter(item.severity for item in faults)
    print(", ".join(f"{counts[severity]} {severity}s" for severity in ("error", "warning")))


def summarize(report: Report, folder: Path, *, verbose: bool) -> None:
    """Print the closing table; `verbose` adds what each pass changed and how long each stage took."""
    from ..stages.layout import FOLDER
    from ..stages.triton import REPOSITORY

    rows = [*_verdict_rows(report), *_measured_rows(report)]
    rows += [("not quantized", f"{count} linears, {reason}") for reason, count in report.skipped()]
    if verbose:
        rows += [("pass", f"{item.name}: {len(item.changed)} changed, {len(item.skipped)} left alone") for item in report.passes]
    rows += [("seconds", f"{stage}: {seconds}") for stage, seconds in report.seconds.items()] if verbose else []
    print_table(["", ""], rows, title=f"{report.model} -> {folder}")
    print(f"report: {one_line(folder / 'report.html')}")
    if (folder / REPOSITORY / "README.md").exists():
        print(f"Triton model repository: {one_line(folder / REPOSITORY)} (README.md there)")
    if (folder / FOLDER).is_dir():
        print(f"pipeline for optimum's ORTDiffusionPipeline: {one_line(folder / FOLDER)}")
    if report.latency:
        warn_if_slower(report.latency)


def _verdict_rows(report: Report) -> list[tuple[str, str]]:
    """Whether the export keeps what its recipe requires, and by how much."""
    verdict = report.verdict
    if verdict is None:
        return []
    rows = [("verdict", verdict.outcome.upper() if verdict.outcome == "failed" else verdict.outcome)]
    if verdict.worst:
        call = verdict.worst
        required = f"{call.sqnr:.1f} dB at timestep {call.timestep:g} ({call.stage}); required {verdict.min_sqnr:g}"
        rows.append(("worst call", required))
    if report.audit:
        rows.append(("low precision", f"{report.audit.integer_share:.1%} of all GEMM FLOPs"))
        share = f"{report.audit.coverage:.1%} of those that the recipe quantizes; required {verdict.min_coverage:.1%}"
        rows.append(("", share))
    if report.engine and report.parity and not report.ran():
        rows.append(("engine", f"plan not run here ({report.engine}): the graph that it is built from was compared"))
    return rows


def _measured_rows(report: Report) -> list[tuple[str, str]]:
    """Distance from PyTorch, size and speed."""
    rows = []
    trajectories = report.parity.trajectories if report.parity else ()
    pictures = {row.stage: ", ".join(filter(None, [f"; pictures {row.sqnr:.1f} dB", row.appearance()])) for row in trajectories}
    for stage in report.stages():
        low = report.worst_call(stage)
        assert low is not None  # stages are those that have calls
        calls = f"calls {report.mean_sqnr(stage):.1f} dB mean, {low.sqnr:.1f} worst (t={low.timestep:g})"
        rows.append((f"SQNR {stage}", calls + pictures.get(stage, "")))
    if report.size:
        size = report.size
        ratio = size.float_bytes / size.engine_bytes
        rows.append(("size", f"{size.float_bytes / 1e6:.1f} -> {size.engine_bytes / 1e6:.1f} MB ({ratio:.2f}x smaller)"))
    if report.text_encoder:
        rows.append(("text encoder", str(report.text_encoder)))
    if report.latency:
        speed = report.latency
        times = f"float {speed.float_ms:.2f} ms, engine {speed.engine_ms:.2f} ms: {speed.ratio:.2f}x"
        rows.append((f"latency, batch {speed.batch}", times))
    return rows


def warn_if_slower(latency: LatencyReport) -> None:
    """Name the slower operators on stderr if the float graph is faster."""
    from ..stages.bench import losing

    if latency.ratio < 1:
        slower_operators = ", ".join(losing(latency)[:5]) or "`dq-export bench OUT` lists them"
        slower = f"the quantized engine is {1 / latency.ratio:.2f}x slower than {latency.baseline}"
        print(f"warning: {slower}; slower operators: {slower_operators}", file=sys.stderr)
