"""The command line, which with `progress` and `tables` is the only place that prints or reads the environment."""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .progress import Lines
from .tables import (
    print_audit,
    print_bisection,
    print_faults,
    print_findings,
    print_latency,
    print_linears,
    print_search,
    print_verification,
    summarize,
    warn_if_slower,
)

if TYPE_CHECKING:
    from dq_export.core.recipe import Recipe

FAILED, USAGE, AUDIT, PARITY, ELSEWHERE, UNMET, INTERRUPTED = 1, 2, 3, 4, 5, 6, 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LINE_LENGTH, LINES = 1000, 40
"""Characters of a line, and lines, of an error."""

app = typer.Typer(
    pretty_exceptions_enable=False,
    name="dq-export",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def option(text: str, *names: str) -> Any:
    """A typer option whose default, where it has one, is in its text: recipe files may set another."""
    return typer.Option(*names, help=text, show_default=False)


def expanded(path: str) -> Path:
    """A path with `~` replaced, which shells leave alone behind `--option=`."""
    return Path(os.path.expanduser(path))


def path_option(text: str, *names: str) -> Any:
    """Like `option`, of a path."""
    return typer.Option(*names, help=text, show_default=False, parser=expanded, metavar="<path>")


def path_argument(text: str) -> Any:
    """A typer argument that is a path."""
    return typer.Argument(help=text, show_default=False, parser=expanded)


def export_options(
    model: Annotated[str, option("dit, dit-digits, a hub id or a diffusers folder", "--model", "-m")] = "",
    revision: Annotated[str, option("of a hub id: branch, tag or commit", "--revision")] = "",
    variant: Annotated[str, option("of the weights, where several are: fp16 …", "--variant")] = "",
    format_: Annotated[str, option("ort, trt, trt-rtx; onnx: graph alone (default ort)", "--format")] = "",
    provider: Annotated[str, option("for --format ort: cpu or openvino (default cpu)", "--provider")] = "",
    dtype: Annotated[str, option("fp32, fp16 or bf16 of the rest (default the format's)", "--dtype")] = "",
    target: Annotated[str, option("for trt-rtx: GPUs (default sm89,sm120)", "--target")] = "",
    min_shapes: Annotated[str, option("for trt: name:AxB,… as trtexec's (default batch 1)", "--min-shapes")] = "",
    opt_shapes: Annotated[str, option("the shapes to be fastest at (default batch 2)", "--opt-shapes")] = "",
    max_shapes: Annotated[str, option("the greatest shapes (default batch 16)", "--max-shapes")] = "",
    bits: Annotated[str, option("w8a8 w8a16 w6a6 w4a8 w4a16 w4a4; trt fp8 (default w8a8)", "--bits")] = "",
    granularity: Annotated[str, option("scales for a tensor, token or token-group", "--granularity")] = "",
    group_size: Annotated[int | None, option("inputs that share a weight scale; 0: all", "--group-size")] = None,
    rounding: Annotated[str, option("of weights: rtn, mse or gptq (default rtn)", "--rounding")] = "",
    bias_correction: Annotated[bool | None, option("correct mean errors", "--bias-correction/--no-bias-correction")] = None,
    attention: Annotated[str, option("float, or fp8 with trt (default float)", "--attention")] = "",
    timesteps: Annotated[str, option("auto, shared or per-sample (default auto)", "--timesteps")] = "",
    recipe: Annotated[Path | None, path_option("YAML with these options and rules; flags win", "--recipe")] = None,
    method: Annotated[str, option("minmax, percentile or mse (default minmax)", "--method")] = "",
    percentile: Annotated[float | None, option("for --method percentile (default 99.99)", "--percentile")] = None,
    bins: Annotated[str, option("auto, per-step, or a number; 1 is static", "--bins")] = "",
    scaling: Annotated[str, option("auto none dilate smooth balance equalize (default auto)", "--scaling")] = "",
    alpha: Annotated[float | None, option("for --scaling smooth (default 0.5)", "--alpha")] = None,
    rho: Annotated[float | None, option("for --scaling dilate (default 1.0)", "--rho")] = None,
    shift: Annotated[bool | None, option("per-channel shift (default where auto gains)", "--shift/--no-shift")] = None,
    exclude: Annotated[list[str] | None, option("REGEX of linears to leave float; repeatable", "--exclude")] = None,
    calibration: Annotated[str, option("uniform, or progressive: on quantized steps", "--calibration")] = "",
    calib_size: Annotated[int | None, option("pictures to sample (default 16)", "--calib-size")] = None,
    steps: Annotated[int | None, option("sampler steps a picture (default 50)", "--steps")] = None,
    parity_size: Annotated[int | None, option("pictures to compare with PyTorch's (default 10)", "--parity-size")] = None,
    guidance_scale: Annotated[float | None, option("guidance (default the model's)", "--guidance-scale")] = None,
    seed: Annotated[int | None, option("of noise and labels (default 0)", "--seed")] = None,
    triton: Annotated[bool | None, option("also write a Triton model repository, OUT/triton", "--triton")] = None,
    min_coverage: Annotated[float | None, option("share required in low precision (default 0.95)", "--min-coverage")] = None,
    min_sqnr: Annotated[float | None, option("dB required of each network call (default 20)", "--min-sqnr")] = None,
    output_dir: Annotated[Path, path_option("new, or an earlier run to continue (default out)", "--output-dir", "-o")] = Path(
        "out"
    ),
    device: Annotated[str, option("where PyTorch samples: cpu or cuda (default cpu)", "--device")] = "cpu",
    max_memory: Annotated[float | None, option("GiB; what cannot fit is said before it starts", "--max-memory")] = None,
    overwrite: Annotated[bool, option("redo in a folder of another run what differs", "--overwrite")] = False,
    as_json: Annotated[bool, option("print report.json instead of the summary", "--json")] = False,
    verbose: Annotated[bool, option("also what each pass and stage did", "--verbose", "-v")] = False,
    quiet: Annotated[bool, option("only errors and the summary", "--quiet", "-q")] = False,
) -> None:
    """The options of every command that exports."""


def exporting(until: str, text: str) -> Callable[..., None]:
    """A command with the export's options that stops after a stage."""

    def command(context: typer.Context, **options: Any) -> None:
        if context.invoked_subcommand is None:
            _export(until, options)

    signature = inspect.signature(export_options, eval_str=True)
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    command.__signature__ = signature.replace(parameters=[context, *signature.parameters.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {"context": typer.Context, **{p.name: p.annotation for p in signature.parameters.values()}}
    command.__doc__ = text
    return command


def _export(until: str, options: dict[str, Any]) -> None:
    from ..pipeline import run
    from ..report.report import FRONT
    from ..report.verdict import require

    folder, path = options.pop("output_dir"), options.pop("recipe")
    how = {key: options.pop(key) for key in ("overwrite", "as_json", "quiet", "verbose", "max_memory", "device")}
    exclude = tuple(options.pop("exclude") or ())
    options["format"] = options.pop("format_")
    given: dict[str, Any] = {key: value for key, value in options.items() if value not in ("", None)}
    for key in ("bits", "format", "provider", "dtype"):
        if key in given:
            given[key] = given[key].lower()
    if re.fullmatch(r"-?\d+", str(given.get("bins", ""))):
        given["bins"] = int(given["bins"])
    recipe = _recipe(path, given)
    group = _group(until)
    quiet = how["quiet"] or how["as_json"] or group.rank > 0
    with _watching(quiet=quiet, then="the same command continues after the last finished stage") as watch:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if how["device"] == "cuda" else how["device"]
        more = {"exclude": exclude, "device": device, **{key: how[key] for key in ("overwrite", "max_memory")}}
        if path:
            more["front"] = path.parent / FRONT
        report = run(recipe, folder, until=until, progress=watch, group=group, **more)
    if report is not None and how["as_json"]:
        print(report.model_dump_json(indent=1))
    elif report is not None:
        summarize(report, folder, verbose=how["verbose"])
    if group.size > 1:
        group.leave()
        _end(0)  # gloo's threads sometimes abort a process that ends by itself
    require(report.verdict if report else None)


def _recipe(path: Path | None, given: dict[str, Any]) -> Recipe:
    """The recipe of a file and of flags, which win. A flag for another model leaves out what the file says of its own."""
    from dq_export.core.recipe import Recipe, RecipeError

    base = Recipe.read(path) if path else {}
    if given.get("model", base.get("model")) != base.get("model"):
        base = {key: value for key, value in base.items() if key not in ("revision", "variant")}
    values = {**base, **given}
    if "model" not in values:
        raise RecipeError("--model is missing: dit, dit-digits, a hub id or a diffusers folder")
    return Recipe.parse(values, f"recipe {path} with flags" if path else "option")


@contextmanager
def _watching(*, quiet: bool, then: str) -> Iterator[Lines]:
    """Progress of a long command, which an interrupt ends with status 130 and a line that says how to go on."""
    watch = Lines(quiet=quiet)
    signal.signal(signal.SIGINT, watch.interrupt)
    try:
        yield watch
    except (KeyboardInterrupt, Exception):  # libraries turn an interrupt into errors of their own
        if not watch.interrupted:
            raise
        watch.stop()
        print(f"\ninterrupted; {then}", file=sys.stderr)
        _end(INTERRUPTED)
    finally:
        watch.stop()


def _end(status: int) -> NoReturn:
    """End the process at once, all being on disk, whatever its libraries would make of its end.

    Python itself ends by SIGINT, not with a status, where the interrupt struck code that a library compiled from a string.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def _order_sums() -> None:
    """Make the math library of PyTorch sum in one order whatever the number of threads, before it is loaded.

    Tables are then the same, bit for bit, on one process and under torchrun, which gives each process one thread. It
    costs nothing measurable. Source: Intel oneMKL developer guide, "Strict CNR mode".
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _group(until: str) -> Any:
    """The processes that torchrun started; one alone without it."""
    from dq_export.calibration.group import ALONE, join_group
    from dq_export.core.recipe import RecipeError

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return ALONE
    if until != "calibrate":
        raise RecipeError(
            f"{processes} processes share only a calibration: run `torchrun … -m dq_export calibrate …`, then dq-export alone"
        )

    def end(number: int, frame: object) -> None:
        print("error: ended because another process of the run did; the same command continues", file=sys.stderr)
        os._exit(FAILED)

    signal.signal(signal.SIGTERM, end)
    return join_group()


EVERYTHING = """Diffusion transformers to quantized engines that provably run on low-precision kernels.

Without a command: calibrate, quantize, build, audit, verify against PyTorch and bench, into one folder.
Exit status: 0 done, 1 failed, 2 bad input, 3 engine runs in float, 4 too far from PyTorch,
5 all but the engine, which a machine with a GPU must build, 130 interrupted.
"""
app.callback(invoke_without_command=True)(exporting("bench", EVERYTHING))
for _stage, _text in (
    ("calibrate", "Measure the model and decide all scales."),
    ("quantize", "Up to the Q/DQ graph model.onnx."),
    ("build", "Up to the engine, not audited or verified."),
):
    app.command(_stage)(exporting(_stage, _text))

Folder = Annotated[Path, path_argument("an export's output folder")]
Json = Annotated[bool, typer.Option("--json", help="print JSON", show_default=False)]


@app.command()
def search(
    model: Annotated[str, option("dit, dit-digits, a hub id or a diffusers folder", "--model", "-m")] = "",
    revision: Annotated[str, option("of a hub id: branch, tag or commit", "--revision")] = "",
    variant: Annotated[str, option("of the weights, where several are: fp16 …", "--variant")] = "",
    target_sqnr: Annotated[float | None, option("dB to keep, at the least size", "--target-sqnr")] = None,
    max_size: Annotated[float | None, option("MB of weights, for the best pictures", "--max-size")] = None,
    max_latency: Annotated[float | None, option("ms of a call of batch 2, timed here", "--max-latency")] = None,
    recipe: Annotated[Path | None, path_option("YAML of everything that is not searched", "--recipe")] = None,
    rounding: Annotated[str, option("of weights: rtn, mse or gptq (default rtn)", "--rounding")] = "",
    seed: Annotated[int | None, option("of noise, labels and the search (default 0)", "--seed")] = None,
    evaluations: Annotated[int, option("mixes to try (default 300)", "--evaluations")] = 300,
    strategy: Annotated[str, option("descend, or evolve as Q-DiT does (default descend)", "--strategy")] = "descend",
    pictures: Annotated[int, option("that judge a mix (default 4)", "--pictures")] = 4,
    steps: Annotated[int, option("sampler steps of those pictures (default 12)", "--steps")] = 12,
    output_dir: Annotated[Path, path_option("new, or of the same search to continue", "--output-dir", "-o")] = Path("search"),
    quiet: Annotated[bool, option("only errors and the summary", "--quiet", "-q")] = False,
) -> None:
    """Look for the best mix of bits, groups and granularities; export its winner.yaml with --recipe.

    Exit status 6: nothing that was tried meets the goal; there is no winner.yaml.
    """
    from ..search.explore import WINNER, explore
    from ..search.request import SearchRequest

    given = {"model": model, "revision": revision, "variant": variant, "rounding": rounding, "seed": seed}
    base = _recipe(recipe, {key: value for key, value in given.items() if value not in ("", None)})
    request = SearchRequest(
        target_sqnr=target_sqnr, max_size=max_size, max_latency=max_latency, evaluations=evaluations, strategy=strategy,
        pictures=pictures, steps=steps,
    )  # fmt: skip
    with _watching(quiet=quiet, then="the same command continues after the last evaluation") as watch:
        found = explore(base, output_dir, request, progress=watch)
    print_search(found)
    print(f"{found.evaluations} evaluations; export it: dq-export --recipe {output_dir / WINNER} -o out")


@app.command()
def verify(
    out: Folder,
    min_sqnr: Annotated[float | None, option("dB that every call must keep (default as exported)", "--min-sqnr")] = None,
    verbose: Annotated[bool, option("also all that polygraphy prints", "--verbose", "-v")] = False,
) -> None:
    """Replay the recorded calls of parity/ on the graph, and judge the worst."""
    from ..verification import verify_again

    done = verify_again(out, min_sqnr, verbose=verbose)
    print_verification(done)
    if not done.passed:
        raise typer.Exit(PARITY)


@app.command()
def bisect(
    out: Folder,
    min_sqnr: Annotated[float | None, option("dB that every call must keep (default the recipe's)", "--min-sqnr")] = None,
) -> None:
    """Name the pass and the linear that break parity; cut out the graph that fails."""
    from ..stages.bisection import bisect_passes

    with _watching(quiet=False, then="nothing was changed") as watch:
        watch.begin("bisect", "the passes one by one, on the recorded calls")
        found = bisect_passes(out, min_sqnr, watch.advance)
    print_bisection(found)
    if found.broken:
        raise typer.Exit(PARITY)


@app.command()
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


@app.command()
def finish(out: Folder) -> None:
    """Build and audit the engine of a folder that another machine exported."""
    from ..finished import finish as build
    from ..report.verdict import require

    with _watching(quiet=False, then="the same command starts the build anew") as watch:
        watch.begin("build", str(out))
        start = time.monotonic()
        report = build(out, watch.advance)
        assert report.audit is not None
        share = f"{report.audit.coverage:.1%} of the quantized FLOPs in low precision"
        watch.end(time.monotonic() - start, share, kept=False)
    summarize(report, out, verbose=False)
    require(report.verdict)


@app.command()
def bench(out: Folder, as_json: Json = False) -> None:
    """Time the engine, the float graph and PyTorch in turn; list memory and operators."""
    from ..finished import bench_again

    with _watching(quiet=as_json, then="nothing was changed") as watch:
        watch.begin("bench", "PyTorch, the float graph and the engine in turn")
        latency = bench_again(out, watch.advance)
    if as_json:
        print(latency.model_dump_json(indent=1))
    else:
        print_latency(latency)
    warn_if_slower(latency)


@app.command()
def check(
    model: Annotated[Path, path_argument("an ONNX file, of ours or not")],
    target: Annotated[
        str, typer.Option(help="trt, trt-rtx, ort: its CPU provider, or ort-cuda: its CUDA provider", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """What a target will run in low precision, in float or not at all."""
    from ..finished import check_file

    findings = check_file(model, target)
    if as_json:
        print(json.dumps([asdict(item) for item in findings], indent=1))
    else:
        print_findings(findings)
    if any(item.failed for item in findings):
        raise typer.Exit(AUDIT)


@app.command()
def triton(
    out: Annotated[Path, path_argument("an export's output folder, or with --check a model repository")],
    only_check: Annotated[bool, typer.Option("--check", help="say what is wrong with a repository, of ours or not")] = False,
) -> None:
    """Write OUT/triton, a Triton model repository, or check one."""
    if only_check:
        _check_repository(out)
        return
    from ..finished import serve_again

    with _watching(quiet=False, then="the same command continues") as watch:
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


@app.command()
def explain(
    out: Folder,
    name: Annotated[str, typer.Argument(help="module name of a linear, or a part of several names", show_default=False)] = "",
) -> None:
    """Why a linear is quantized as it is; without its whole name, a few lines for each linear."""
    from dq_export.core.violations import nearest

    from ..finished import read_report
    from ..output_folder import OutputError

    report = read_report(out)
    names = [linear.name for linear in report.linears]
    print_linears(report, name)
    if not any(name in item for item in names):
        raise OutputError(f"no linear '{name}' in {out}.{nearest(name, names)}")


def _statuses() -> dict[type[Exception], int]:
    """Every error that is the user's to mend, with its exit status."""
    from dq_export.core.artifacts import CalibrationError
    from dq_export.core.recipe import RecipeError
    from dq_export.deploy.audit import AuditError
    from dq_export.deploy.backend import BackendError, NotHereError
    from dq_export.deploy.parity import ParityError
    from dq_export.passes.base import GraphError

    from ..families.reference import ModelError
    from ..output_folder import OutputError
    from ..search.request import SearchError

    return {
        ModelError: USAGE,
        RecipeError: USAGE,
        OutputError: USAGE,
        CalibrationError: FAILED,
        GraphError: FAILED,
        BackendError: FAILED,
        NotHereError: ELSEWHERE,
        AuditError: AUDIT,
        ParityError: PARITY,
        SearchError: UNMET,
    }


def main() -> None:
    """Run the command line; user errors become one message and a status, never a traceback."""
    _order_sums()
    try:
        app()
    except SystemExit:  # first: looking up the errors below would load libraries that --help does without
        raise
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        _end(FAILED)
    except (ImportError, MemoryError, OSError) as error:
        _print_error(_reason(error))
        sys.exit(FAILED)
    except tuple(_statuses()) as error:
        _print_error(str(error))
        sys.exit(_statuses()[type(error)])


def _reason(error: ImportError | MemoryError | OSError) -> str:
    """What the system or the interpreter refused, and what to do."""
    if isinstance(error, ImportError):
        if error.name is None:
            return f"a package cannot be imported: {error}"
        return f"the package '{error.name}' is missing; pip install 'dq-export[cpu]'"
    if isinstance(error, MemoryError):
        return "not enough memory; --max-memory GIB says before the work starts what does not fit"
    if error.errno in NO_SPACE:
        place = error.filename or "the output folder"
        return f"no space left for {place}; free some and run the same command again: finished stages are kept"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _print_error(message: str) -> None:
    """Print lines on stderr: what names and files of others hold cannot steer the terminal, or flood it."""
    from dq_export.core.documents import printable

    lines = [printable(line, LINE_LENGTH) for line in message.splitlines()]
    print("error: " + "\n".join(lines[:LINES]), file=sys.stderr)
    if len(lines) > LINES:
        print(f"… and {len(lines) - LINES} more lines", file=sys.stderr)
