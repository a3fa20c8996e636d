"""The command line's commands. `dq_export.cli` is the only place that prints or reads the environment."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Annotated

import typer

from dq_export import __version__

from . import commands
from .errors import FAILED, USAGE, end, print_error, print_misuse, reason_of, statuses
from .export import distill, exporting
from .search import search

app = typer.Typer(
    pretty_exceptions_enable=False,
    name="dq-export",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

MISUSE: type[Exception] = typer.BadParameter.__mro__[2]
"""The class of all errors of usage, ClickException. It has no public name: typer holds a copy of click."""
DESCRIPTION = """Diffusion models to quantized engines that provably run on low-precision kernels.

Without a command: calibrate, quantize, build, audit, verify against PyTorch and bench, into one folder.

\b
Examples:
  dq-export --model dit-digits -o out
  dq-export --model dit --format trt --bits fp8 -o out
  dq-export --model pixart --prompts prompts.txt -o out
  dq-export --recipe out/recipe.yaml --bits w4a8 -o other
  dq-export explain out

\b
Exit status: 0 done, 1 failed, 2 bad input, 3 engine runs in float,
4 too far from PyTorch, 5 all but the engine, which a machine with a GPU
must build, 6 a search met no goal, 130 interrupted.
"""
STAGES = (
    ("calibrate", "Measure the model and choose all scales."),
    ("quantize", "Stop after the Q/DQ graph model.onnx."),
    ("build", "Stop after the engine, without audit and verification."),
)
COMMANDS = (
    commands.verify, commands.bisect, commands.audit, commands.finish, commands.bench, commands.check, commands.triton,
    commands.explain, commands.compare, commands.push, commands.doctor, distill,
)  # fmt: skip


def show_version(requested: bool) -> None:
    """Print the version and end."""
    if requested:
        print(f"dq-export {__version__}")
        raise typer.Exit()


VERSION = inspect.Parameter(
    "version",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--version", help="print the version and end", callback=show_version, is_eager=True)],
)

app.callback(invoke_without_command=True)(exporting("bench", DESCRIPTION, (VERSION,)))
for _stage, _text in STAGES:
    app.command(_stage)(exporting(_stage, _text))
app.command("search")(search)
for _command in COMMANDS:
    app.command()(_command)


def _order_sums() -> None:
    """Make PyTorch's math library sum in one order, whatever the number of threads. Call it before the library is loaded.

    Then tables are the same, bit for bit, in one process and under torchrun, which gives each process one thread. It
    costs nothing measurable. Source: Intel oneMKL developer guide, "Strict CNR mode".
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def main() -> None:
    """Run the command line; user errors become one message and a status, never a traceback."""
    _order_sums()
    try:
        status = app(standalone_mode=False)
    except SystemExit:  # first: looking up the errors below would load libraries that --help does without
        raise
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        end(FAILED)
    except MISUSE as error:
        print_misuse(error)
        sys.exit(USAGE)
    except tuple(statuses()) as error:
        print_error(str(error))
        codes = statuses()
        sys.exit(next(codes[kind] for kind in type(error).__mro__ if kind in codes))  # the nearest class
    except Exception as error:
        reason = reason_of(error)
        if not reason:
            raise
        print_error(reason)
        sys.exit(FAILED)
    sys.exit(status if isinstance(status, int) else 0)  # a status is what `typer.Exit` holds
