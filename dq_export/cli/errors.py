"""How a command ends: exit statuses, one message for a user's error, and interrupts."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from .progress import Lines

FAILED, USAGE, AUDIT, PARITY, ELSEWHERE, UNMET, INTERRUPTED = 1, 2, 3, 4, 5, 6, 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LINE_LENGTH, LINES = 1000, 40
"""The greatest number of characters of a line, and of lines, of an error."""


@contextmanager
def watching(*, quiet: bool, advice: str) -> Iterator[Lines]:
    """Show the progress of a long command. An interrupt ends it with status 130 and a line that says how to continue."""
    watch, before = Lines(quiet=quiet), sys.unraisablehook

    def unraisable(failure: sys.UnraisableHookArgs) -> None:
        # The interpreter swallows an interrupt inside one of its callbacks; the run then stops at its next report of progress.
        if not (watch.interrupted and isinstance(failure.exc_value, KeyboardInterrupt)):
            before(failure)

    signal.signal(signal.SIGINT, watch.interrupt)
    sys.unraisablehook = unraisable
    try:
        yield watch
    except (KeyboardInterrupt, Exception):  # libraries turn an interrupt into errors of their own
        if not watch.interrupted:
            raise
        watch.stop()
        print(f"\ninterrupted; {advice}", file=sys.stderr)
        end(INTERRUPTED)
    finally:
        sys.unraisablehook = before
        watch.stop()


def end(status: int) -> NoReturn:
    """End the process at once, without the exit handlers of its libraries. All results are already on disk.

    A plain `sys.exit` is not enough: if the interrupt hit code that a library had compiled from a string, Python ends with the
    signal SIGINT in place of the status.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def statuses() -> dict[type[Exception], int]:
    """The exit status of every error that a user can correct."""
    from dq_export.core.artifacts import CalibrationError
    from dq_export.core.plugins import PluginError
    from dq_export.core.recipe import RecipeError
    from dq_export.deploy.audit import AuditError
    from dq_export.deploy.backend import BackendError, NotHereError
    from dq_export.deploy.parity import ParityError
    from dq_export.passes.base import GraphError

    from ..families.reference import ModelError
    from ..hub_folder import HubError
    from ..output_folder import OutputError
    from ..search.request import SearchError

    return {
        ModelError: USAGE,
        RecipeError: USAGE,
        OutputError: USAGE,
        CalibrationError: FAILED,
        PluginError: FAILED,
        GraphError: FAILED,
        BackendError: FAILED,
        HubError: FAILED,
        NotHereError: ELSEWHERE,
        AuditError: AUDIT,
        ParityError: PARITY,
        SearchError: UNMET,
    }


def reason_of(error: Exception) -> str:
    """The error of a plug-in, the system or the interpreter, and what to do; empty for a fault of dq-export itself."""
    from dq_export.core.plugins import fault_of_plugin

    if fault := fault_of_plugin(error):
        return str(fault)
    if isinstance(error, ImportError):
        if error.name is None:
            return f"a package cannot be imported: {error}"
        return f"the package '{error.name}' is missing; pip install 'dq-export[cpu]'"
    if isinstance(error, MemoryError):
        return "not enough memory; --max-memory GIB says before the work starts what does not fit"
    if not isinstance(error, OSError):
        return ""
    if error.errno in NO_SPACE:
        place = error.filename or "the output folder"
        return f"no space left for {place}; free some and run the same command again: finished stages are kept"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def print_misuse(error: Any) -> None:
    """Print typer's error of usage in the form of dq-export's; for a command without any arguments, the error is the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    help_of = error.ctx.command_path if getattr(error, "ctx", None) else "dq-export"
    message = error.format_message().rstrip(".")
    print_error(f"{message} See {help_of} --help" if message.endswith("?") else f"{message}; see {help_of} --help")


def print_error(message: str) -> None:
    """Print lines on stderr. Control characters in names and files are escaped, and the output is bounded."""
    from dq_export.core.documents import printable

    lines = [printable(line, LINE_LENGTH) for line in message.splitlines()]
    print("error: " + "\n".join(lines[:LINES]), file=sys.stderr)
    if len(lines) > LINES:
        print(f"… and {len(lines) - LINES} more lines", file=sys.stderr)
