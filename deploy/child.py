"""Run work in a separate process, which isolates its aborts and its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a child process ended.

    Args:
        status: 0, the exit status, or -N for signal N.
        reason: the last line that it printed, or a placeholder.
    """

    status: int
    reason: str


def run_child(module: str, request: object, receive: Callable[[dict[str, Any]], None]) -> Exit:
    """Run `python -m module FD`, write `request` to its standard input as JSON, and receive one JSON object per line from FD.

    The child's own output, mostly messages of libraries, is not shown. The child is killed if `receive` raises.

    Args:
        request: its paths must be absolute: the child starts in the package's folder, so that it imports nothing from the
            current folder.
        receive: called with each object when it arrives.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output, open(reading, encoding="utf-8") as answers:
        command = [sys.executable, "-m", module, str(writing)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True, pass_fds=(writing,), cwd=_start()
        ) as child:
            os.close(writing)
            assert child.stdin is not None
            try:
                with suppress(BrokenPipeError):  # the child ended before it read the request; its status gives the reason
                    child.stdin.write(json.dumps(request))
                    child.stdin.close()
                for line in answers:
                    receive(json.loads(line))
            except BaseException:
                child.kill()
                raise
        output.seek(0)
        lines = output.read().strip().splitlines()
    return Exit(status=child.returncode, reason=lines[-1] if lines else "it printed nothing")


def _start() -> Path:
    """The folder that holds the package `dq_export`."""
    package = sys.modules["dq_export"].__file__
    assert package is not None
    return Path(package).resolve().parent.parent
