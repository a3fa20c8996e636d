"""Two finished exports side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dq_export.core.documents import printable
from dq_export.deploy.parity import CallParity

from ..finished_folder import REPORT, FinishedFolder
from ..ledger import RECIPE
from ..output_folder import write_text
from .drawing import calls_plot
from .page import templates
from .report import FLOAT_STAGE, LinearReport, Report

SHOWN = 12
"""The greatest number of listed linears that differ."""
NOT_COMPARED = {"rules", "model", "prompts"}
"""Keys of a recipe that are too long for a table, or that stand in its head."""
Row = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two exports have in common and where they differ; each value is text, of the first and of the second.

    Args:
        names: the folders.
        recipe: keys whose values differ.
        results: verdict, distance from PyTorch, size and speed.
        kernels: by kernel, the share of all GEMM FLOPs that it runs.
        linears: scheme and least SQNR of the linears that differ most.
        calls: of the last compared stage: the engine, or its graph if the engine did not run.
    """

    names: tuple[str, str]
    recipe: tuple[Row, ...]
    results: tuple[Row, ...]
    kernels: tuple[Row, ...]
    linears: tuple[Row, ...]
    calls: tuple[tuple[CallParity, ...], tuple[CallParity, ...]]
    limits: tuple[float | None, float | None]

    def tables(self) -> dict[str, tuple[Row, ...]]:
        """The tables by title, without empty ones."""
        tables = {
            "recipe": self.recipe,
            "results": self.results,
            "GEMM FLOPs by kernel": self.kernels,
            "linears that differ most": self.linears,
        }
        return {title: rows for title, rows in tables.items() if rows}


def compare_folders(first: Path, second: Path) -> Comparison:
    """Read two exports.

    Raises:
        OutputError: one is not a finished export.
        RecipeError: a recipe is damaged.
    """
    folders = [FinishedFolder.open(path, REPORT, RECIPE) for path in (first, second)]
    reports = folders[0].report(), folders[1].report()
    values = [folder.recipe().model_dump(mode="json", exclude=NOT_COMPARED) for folder in folders]
    recipe = [(name, _text(value), _text(values[1][name])) for name, value in values[0].items() if value != values[1][name]]
    return Comparison(
        names=(printable(str(first), 200), printable(str(second), 200)),
        recipe=tuple(recipe),
        results=tuple(_rows([_results(report) for report in reports])),
        kernels=tuple(_rows([_kernels(report) for report in reports])),
        linears=tuple(_linears(*reports)),
        calls=(_calls(reports[0]), _calls(reports[1])),
        limits=(_limit(reports[0]), _limit(reports[1])),
    )


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page: self-contained, without scripts, as the report is."""
    limit = comparison.limits[0] if comparison.limits[0] == comparison.limits[1] else None
    # Two folders may have one name when one is compared with itself.
    series = {f"{number} {name}": comparison.calls[number] for number, name in enumerate(comparison.names)}
    plot = calls_plot(series, limit)
    write_text(path, templates().get_template("compare.html").render(comparison=comparison, plot=plot))


def _results(report: Report) -> dict[str, str]:
    """The numbers of a report, by their labels."""
    last = report.stages()[-1] if report.stages() else ""
    results = {"model": report.model, "exported": report.date or "by an earlier version", "machine": report.machine}
    if report.verdict:
        results["verdict"] = report.verdict.outcome
    if report.audit:
        results["all GEMM FLOPs in low precision"] = f"{report.audit.integer_share:.1%}"
        results["of those that the recipe quantizes"] = f"{report.audit.coverage:.1%}"
    low = report.worst_call(last)
    if low:
        results["compared with PyTorch"] = last
        results["mean SQNR of a call"] = f"{report.mean_sqnr(last):.1f} dB"
        results["worst call"] = f"{low.sqnr:.1f} dB at timestep {low.timestep:g}"
    for trajectory in report.parity.trajectories if report.parity else ():
        results["SQNR of the pictures"] = f"{trajectory.sqnr:.1f} dB"
        if trajectory.appearance():
            results["looks of the pictures"] = trajectory.appearance()
    if report.size:
        results["size"] = f"{report.size.engine_bytes / 1e6:.1f} MB, float {report.size.float_bytes / 1e6:.1f}"
    if report.latency:
        speed = report.latency
        results[f"one call, batch {speed.batch}"] = f"{speed.engine_ms:.2f} ms, float {speed.float_ms:.2f}: {speed.ratio:.2f}x"
    return results


def _kernels(report: Report) -> dict[str, str]:
    """Kernel -> share of all GEMM FLOPs, the greatest first."""
    gemms = report.audit.gemms if report.audit else ()
    total = sum(gemm.flops for gemm in gemms) or 1
    shares: dict[str, float] = {}
    for gemm in gemms:
        shares[gemm.kernel] = shares.get(gemm.kernel, 0.0) + gemm.flops / total
    return {kernel: f"{share:.1%}" for kernel, share in sorted(shares.items(), key=lambda pair: -pair[1])}


def _linears(first: Report, second: Report) -> Iterable[Row]:
    """The linears of both whose scheme or least SQNR differs, the greatest difference first."""
    others = {linear.name: linear for linear in second.linears}
    pairs = [(linear, others[linear.name]) for linear in first.linears if linear.name in others]
    differing = [pair for pair in pairs if _linear_text(pair[0]) != _linear_text(pair[1])]

    def difference(pair: tuple[LinearReport, LinearReport]) -> float:
        one, other = map(_worst_sqnr, pair)
        return abs(one - other) if one is not None and other is not None else float("inf")

    for one, other in sorted(differing, key=difference, reverse=True)[:SHOWN]:
        yield one.name, _linear_text(one), _linear_text(other)


def _linear_text(linear: LinearReport) -> str:
    worst = _worst_sqnr(linear)
    return linear.action if worst is None else f"{linear.action}, {worst:.1f} dB"


def _worst_sqnr(linear: LinearReport) -> float | None:
    """The linear's least SQNR over the timesteps, in dB; None if nothing was measured."""
    return min((value for value in linear.sqnr if value is not None), default=None)


def _calls(report: Report) -> tuple[CallParity, ...]:
    last = report.stages()[-1] if report.stages() else FLOAT_STAGE
    return tuple(call for call in report.parity.calls if call.stage == last != FLOAT_STAGE) if report.parity else ()


def _limit(report: Report) -> float | None:
    return report.verdict.min_sqnr if report.verdict else None


def _rows(sides: list[dict[str, str]]) -> Iterable[Row]:
    """One row for each name that either side has; a dash for a side without it."""
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        yield name, sides[0].get(name, "-"), sides[1].get(name, "-")


def _text(value: object) -> str:
    return "-" if value is None else str(value)
