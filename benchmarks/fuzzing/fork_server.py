"""Runs many small commands, each in its own process. A parent imports PyTorch once, and forks for each command.

The parent runs no PyTorch operator on several threads and no ONNX Runtime session, so its children start with one thread.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

GIB = 1 << 30
PAGE = resource.getpagesize()
POLL = 0.01
"""Seconds between two checks of the children."""


@dataclass(frozen=True)
class Limits:
    """Limits of one process: seconds of wall clock, bytes beyond the memory at its fork, bytes of a file that it writes."""

    seconds: float = 60.0
    memory: int = 1 * GIB
    address_space: int = 6 * GIB
    file: int = GIB


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Args:
        status: the exit status; the negative number of the signal that ended it.
        stopped: the limit for which it was killed, `"time"` or `"memory"`; otherwise empty.
        memory: bytes of its greatest resident set beyond that at its fork.
    """

    status: int
    stopped: str
    seconds: float
    memory: int
    stdout: str
    stderr: str


@dataclass
class _Child:
    pid: int
    folder: Path
    start: float
    resident: int
    peak: int = 0
    stopped: str = ""


class _End:
    """Ends the forked process after any exception, so that the parent's code does not continue in it."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = 0
        if isinstance(error, SystemExit):
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            traceback.print_exception(kind, error, trace)
            status = 1
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def serve(
    jobs: Iterable[tuple[Path, Callable[[], None]]], *, workers: int = 2, limits: Limits | None = None
) -> Iterator[tuple[Path, Outcome]]:
    """Run each job in its own process, `workers` at a time. Yield them as they end.

    Args:
        jobs: pairs of a new empty folder, for `HOME`, `TMPDIR` and the two outputs, and the work.
    """
    bounds = limits or Limits()
    queue, children = iter(jobs), list[_Child]()
    more = True
    while more or children:
        while more and len(children) < workers:
            job = next(queue, None)
            if job is None:
                more = False
            else:
                children.append(_fork(*job, bounds))
        time.sleep(POLL)
        for child in list(children):
            outcome = _look(child, bounds)
            if outcome:
                children.remove(child)
                yield child.folder, outcome


def _fork(folder: Path, work: Callable[[], None], limits: Limits) -> _Child:
    for name in ("home", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        with _End():
            _enter(folder, limits)
            work()
    return _Child(pid, folder, time.monotonic(), _resident(pid) or _resident(os.getpid()))


def _enter(folder: Path, limits: Limits) -> None:
    """Give this process its own group, limits, outputs, and home and temporary folders under `folder`."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, number)
        os.close(target)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"), COLUMNS="200")
    tempfile.tempdir = None
    size = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (size + limits.address_space,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _resident(pid: int) -> int:
    """Return the bytes of a process's resident set; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def _look(child: _Child, limits: Limits) -> Outcome | None:
    """Return the outcome of a child, or None while it runs. A child over a limit is killed with its group."""
    pid, status, usage = os.wait4(child.pid, os.WNOHANG)
    seconds = time.monotonic() - child.start
    if pid == 0:
        child.peak = max(child.peak, _resident(child.pid))
        if seconds > limits.seconds:
            child.stopped = child.stopped or "time"
        elif child.peak - child.resident > limits.memory:
            child.stopped = child.stopped or "memory"
        if child.stopped:
            _kill(child.pid)
        return None
    _kill(child.pid)
    memory = max(child.peak, usage.ru_maxrss * 1024) - child.resident
    return Outcome(
        status=os.waitstatus_to_exitcode(status),
        stopped=child.stopped or ("memory" if memory > limits.memory else ""),
        seconds=seconds,
        memory=max(memory, 0),
        stdout=_text(child.folder / "stdout"),
        stderr=_text(child.folder / "stderr"),
    )


def _kill(group: int) -> None:
    """Kill the remaining processes of a group that this program started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _text(path: Path, limit: int = 1 << 20) -> str:
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""


def command(words: list[str]) -> None:
    """Run `dq-export WORDS` in this process."""
    from dq_export.cli.app import main

    sys.argv = ["dq-export", *words]
    main()


def preload(words: list[str], folder: Path) -> None:
    """Import all modules of a command into this process. The command runs once in a child, which lists its modules.

    Args:
        words: words of a command that imports everything that later ones need.
        folder: a new folder for the child.
    """
    import importlib

    module_list = folder / "modules.txt"

    def work() -> None:
        try:
            command(words)
        finally:
            module_list.write_text("\n".join(name for name in sys.modules if name != "__main__"))

    ((_, outcome),) = serve([(folder, work)], workers=1, limits=Limits(seconds=300, memory=8 * GIB, address_space=64 * GIB))
    if outcome.status != 0:
        raise RuntimeError(f"the command that names the imports failed: {outcome.stderr[-2000:]}")
    import torch

    torch.set_num_threads(1)
    for name in module_list.read_text().splitlines():
        # Some modules exist only while the command runs, and some cannot be imported twice.
        with contextlib.suppress(ImportError, AttributeError, KeyError, RuntimeError, ValueError, OSError):
            importlib.import_module(name)
