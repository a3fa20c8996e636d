"""The commands that work on finished files (an export's folder, an ONNX file, a model repository) or on this machine."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .errors import AUDIT, FAILED, PARITY, watching
from .options import option, path_argument, path_option
from .tables import (
    one_line,
    print_audit,
    print_bisection,
    print_comparison,
    print_diagnosis,
    print_faults,
    print_findings,
    print_latency,
    print_linears,
    print_verification,
    summarize,
    warn_if_slower,
)  # fmt: skip

Folder = Annotated[Path, path_argument("an export's output folder")]
Json = Annotated[bool, typer.Option("--json", help="print JSON", show_default=False)]


def verify(
    out: Folder,
    min_sqnr: Annotated[float | None, option("dB that every call must keep (default as exported)", "--min-sqnr")] = None,
    verbose: Annotated[bool, option("also print polygraphy's output", "--verbose", "-v")] = False,
) -> None:
    """Replay the recorded calls of parity/ on the graph, and judge the worst."""
    from ..verification import verify_again

    verification = verify_again(out, min_sqnr, verbose=verbose)
    print_verification(verification)
    if not verification.passed:
        raise typer.Exit(PARITY)


def bisect(
    out: Folder,
    min_sqnr: Annotated[float | None, option("dB that every call must keep (default the recipe's)", "--min-sqnr")] = None,
) -> None:
    """Name the pass and the linear that break parity; cut out the graph that fails."""
    from ..bisection.bisect import bisect_passes

    with watching(quiet=False, advice="nothing was changed") as watch:
        watch.begin("bisect", "the passes one by one, on the recorded calls")
        bisection = bisect_passes(out, min_sqnr, watch.advance)
    print_bisection(bisection)
    if bisection.broken:
        raise typer.Exit(PARITY)


def audit(out: Folder, as_json: Json = False) -> None:
    """List the kernel of every GEMM on this machine."""
    from ..finished import audit_again

    report, required = audit_again(out)
    if as_json:
        print(json.dumps(asdict(report), indent=1))
    else:
        print_audit(report, required)
    if report.coverage < required:
        raise typer.Exit(AUDIT)


def finish(out: Folder) -> None:
    """Build and audit the engine of a folder that another machine exported."""
    from ..finished import finish as build
    from ..report.verdict import require

    with watching(quiet=False, advice="the same command starts the build anew") as watch:
        watch.begin("build", str(out))
        start = time.monotonic()
        report = build(out, watch.advance)
        assert report.audit is not None
        share = f"{report.audit.coverage:.1%} of the quantized FLOPs in low precision"
        watch.end(time.monotonic() - start, share, kept=False)
    summarize(report, out, verbose=False)
    require(report.verdict)


def bench(out: Folder, as_json: Json = False) -> None:
    """Time the engine, the float graph and PyTorch in turn; list memory and operators."""
    from ..finished import bench_again

    with watching(quiet=as_json, advice="nothing was changed") as watch:
        watch.begin("bench", "PyTorch, the float graph and the engine in turn")
        latency = bench_again(out, watch.advance)
    if as_json:
        print(latency.model_dump_json(indent=1))
    else:
        print_latency(latency)
    warn_if_slower(latency)


def check(
    model: Annotated[Path, path_argument("an ONNX file, made by dq-export or not")],
    target: Annotated[
        str, typer.Option(help="trt, trt-rtx, ort: its CPU provider, or ort-cuda: its CUDA provider", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Predict what a target runs in low precision, in float or not at all."""
    from ..finished import check_file

    findings = check_file(model, target)
    if as_json:
        print(json.dumps([asdict(item) for item in findings], indent=1))
    else:
        print_findings(findings)
    if any(item.failed for item in findings):
        raise typer.Exit(AUDIT)


def triton(
    out: Annotated[Path, path_argument("an export's output folder, or with --check a model repository")],
    only_check: Annotated[bool, typer.Option("--check", help="check a repository, made by dq-export or not")] = False,
) -> None:
    """Write OUT/triton, a Triton model repository, or check one."""
    if only_check:
        _check_repository(out)
        return
    from ..finished import serve_again

    with watching(quiet=False, advice="the same command continues") as watch:
        repository = serve_again(out, watch)
    print(f"{repository}: copy it to the server; {repository / 'README.md'} says how to run it and how to ask")


def _check_repository(folder: Path) -> None:
    from dq_export.deploy.triton.check import check_repository
    from dq_export.deploy.triton.repository import require_triton

    require_triton()
    faults = check_repository(folder)
    print_faults(faults)
    if any(item.severity == "error" for item in faults):
        raise typer.Exit(FAILED)


def explain(
    out: Folder,
    name: Annotated[str, typer.Argument(help="module name of a linear, or a part of several names", show_default=False)] = "",
) -> None:
    """Say why a linear is quantized as it is; without its whole name, a few lines for each linear."""
    from dq_export.core.violations import nearest

    from ..finished import read_report
    from ..output_folder import OutputError

    report = read_report(out)
    names = [linear.name for linear in report.linears]
    print_linears(report, name)
    if not any(name in item for item in names):
        raise OutputError(f"no linear '{name}' in {out}.{nearest(name, names)}")


def compare(
    first: Annotated[Path, path_argument("an export's output folder")],
    second: Annotated[Path, path_argument("another export's")],
    page: Annotated[Path, path_option("the page to write (default compare.html)", "--page")] = Path("compare.html"),
) -> None:
    """Compare two exports: recipe, SQNR by call, kernels, size, speed."""
    from ..report.comparison import compare_folders, write_comparison

    comparison = compare_folders(first, second)
    print_comparison(comparison)
    write_comparison(comparison, page)
    print(f"page: {page}")


def push(
    out: Folder,
    name: Annotated[str, typer.Argument(help="owner/name on the hub", show_default=False)],
) -> None:
    """Publish an export on the Hugging Face hub, with a model card made from its report."""
    from ..hub_folder import push as publish

    address = publish(out, name)
    print(f"published: {one_line(address)}")
    print(f'anybody who may read it draws with: dq_export.load("{name}")')


def doctor() -> None:
    """List what this machine can build, run and serve, and the command that adds what is missing."""
    from ..doctor import diagnose

    print_diagnosis(diagnose())
