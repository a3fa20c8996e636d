"""Timing engines in turn, each in a process of its own: one is in memory at a time, and none sees another's threads."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dq_export.core.progress import Advance, unwatched
from dq_export.deploy.backend import Backend, BackendError, Built, Feed, Float32
from dq_export.deploy.backends import BACKENDS
from dq_export.deploy.child import run_child

from .families.reference import ModelError
from .heap import large_blocks_mapped

ROUNDS, LEAST_ROUNDS, BUDGET = 5, 2, 60.0
"""Turns of each engine, and those that are taken however many seconds they need; no further round starts after BUDGET s."""
WARM_CALLS, CALLS, SECONDS = 2, 3, 0.1
"""Of a turn: untimed calls, then timed ones, at least CALLS and for at least SECONDS."""
LIBRARIES = {"torch": ("torch", "diffusers.models.transformers.dit_transformer_2d"), "ort": ("onnxruntime",)}
"""What takes long to import, by what an engine runs on."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One engine to time.

    Args:
        name: its key in the answer.
        model: absolute path of the engine's graph; for PyTorch what `load_reference` finds from any folder.
        folder: absolute path of what the backend built; for PyTorch `place` of `load_reference`.
        runs_on: (name, provider, dtype) of a backend, or ("torch", None, dtype).
        batch: what the backend may fix the batch to.
        profile: also measure the time by operator.
        files: for PyTorch: revision and variant.
        lora: for PyTorch: adapters that are fused.
        device: for PyTorch: where it computes.
    """

    name: str
    model: str
    runs_on: tuple[str, str | None, str]
    batch: int
    folder: str = ""
    profile: bool = False
    files: tuple[str, str] = ("", "")
    lora: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def built(self) -> Built:
        """The engine on the disk."""
        return Built(model=Path(self.model), folder=Path(self.folder))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured.

    Args:
        milliseconds: of every timed call.
        memory_mb: what loading and the first call added to the process, median of the turns.
        profile: milliseconds of one call by operator; empty if not asked for.
        error: why the engine could not be loaded or run; all else is then empty.
    """

    milliseconds: tuple[float, ...] = ()
    memory_mb: float = 0.0
    profile: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def median(self) -> float:
        """Milliseconds of one call."""
        return statistics.median(self.milliseconds)


def time_engines(engines: Sequence[Timed], feed: Feed, progress: Advance = unwatched, rounds: int = ROUNDS) -> dict[str, Timing]:
    """Time every engine in `rounds` turns, each turn in a process that loads it, warms it up, times it and ends.

    The machine's noise changes slowly against a turn, and every second round runs backwards, so all engines see the same
    noise: read the ratios. Large engines get fewer rounds: at least two, none begins after a minute.

    Args:
        feed: one network call's inputs.
        progress: called with (turns done, turns in all).

    Raises:
        BackendError: the processes could not be started.
    """
    turns: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}

    def receive(message: dict[str, Any]) -> None:
        turns[message.pop("name")].append(message)
        progress(sum(map(len, turns.values())), len(engines) * rounds)

    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "feed.npz"
        arrays: dict[str, Any] = dict(feed)
        np.savez(inputs, **arrays)
        request = {"engines": [asdict(engine) for engine in engines], "feed": str(inputs), "rounds": rounds}
        end = run_child("dq_export.timing", request, receive)
    if end.status:
        raise BackendError(f"the process that times the engines ended with status {end.status}: {end.reason}")
    return {name: _joined(times) for name, times in turns.items()}


def timed(name: str, backend: Backend, built: Built, batch: int, *, profile: bool) -> Timed:
    """An engine to time that a backend built."""
    model, folder = str(built.model.resolve()), str(built.folder.resolve())
    return Timed(name=name, model=model, folder=folder, runs_on=_key(backend), batch=batch, profile=profile)


def _key(backend: Backend) -> tuple[str, str | None, str]:
    """What `Timed.runs_on` names a backend by."""
    return backend.name, backend.provider, backend.dtype


def _joined(turns: list[dict[str, Any]]) -> Timing:
    """All turns of one engine."""
    errors = [turn["error"] for turn in turns if "error" in turn]
    if errors:
        return Timing(error=errors[0])
    return Timing(
        milliseconds=tuple(value for turn in turns for value in turn["milliseconds"]),
        memory_mb=statistics.median(turn["memory_mb"] for turn in turns),
        profile=next((turn["profile"] for turn in turns if turn["profile"]), {}),
    )


def serve(channel: TextIO, line: str) -> None:
    """The child: imports what the engines need, then forks once for each turn.

    A fork costs milliseconds where a new interpreter would import for a second. It is safe because this process has loaded
    libraries but no engine: it has no thread that could hold a lock.
    """
    request = json.loads(line)
    engines = [
        Timed(**{**item, "runs_on": tuple(item["runs_on"]), "files": tuple(item["files"]), "lora": tuple(item["lora"])})
        for item in request["engines"]
    ]
    _end_with_parent()
    _import_libraries(engines)
    failed: set[str] = set()
    start = time.monotonic()
    for number in range(request["rounds"]):
        if number >= LEAST_ROUNDS and time.monotonic() - start > BUDGET:
            break
        for engine in engines if number % 2 == 0 else reversed(engines):
            if engine.name not in failed:
                answer = _turn(engine, request["feed"], first=number == 0)
                failed.update([engine.name] if "error" in answer else [])
                channel.write(json.dumps({"name": engine.name, **answer}) + "\n")
                channel.flush()


def _turn(engine: Timed, feed: str, *, first: bool) -> dict[str, Any]:
    """One turn of an engine in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            _end_with_parent()
            with open(writing, "w", encoding="utf-8") as channel:
                json.dump(_measured(engine, feed, profile=engine.profile and first), channel)
            status = 0
        finally:
            if status:
                traceback.print_exc()  # its last line becomes the reason that the user reads
            os._exit(status)  # the parent's own work must not go on in its copy
    os.close(writing)
    with open(reading, encoding="utf-8") as channel:
        text = channel.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        answer: dict[str, Any] = json.loads(text)
        return answer
    if code > 0:
        sys.exit(code)  # with the traceback that the turn printed
    cause = "was killed, most likely for lack of memory" if code == -signal.SIGKILL else f"was ended by signal {-code}"
    return {"error": f"the process that times {engine.model} {cause}"}


def _measured(engine: Timed, feed: str, *, profile: bool) -> dict[str, Any]:
    """Load, warm up, time; the profile, which loads the graph anew, comes last."""
    with np.load(feed) as content:
        inputs = dict(content)
    before = _resident()
    try:
        with _bound(engine, inputs) as call:
            call()
            memory = _resident() - before
            for _ in range(WARM_CALLS - 1):
                call()
            milliseconds: list[float] = []
            start = time.perf_counter()
            while len(milliseconds) < CALLS or time.perf_counter() - start < SECONDS:
                begin = time.perf_counter()
                call()
                milliseconds.append((time.perf_counter() - begin) * 1e3)
        del call
        operators = _backend(engine).profile(engine.built, inputs) if profile else {}
    except (BackendError, ModelError) as error:
        return {"error": str(error)}
    return {"milliseconds": milliseconds, "memory_mb": memory, "profile": operators}


@contextlib.contextmanager
def _bound(engine: Timed, feed: Feed) -> Iterator[Callable[[], Float32]]:
    """The call of one feed, whose inputs lie where the engine computes."""
    if engine.runs_on[0] != "torch":
        with large_blocks_mapped():
            yield _backend(engine).load(engine.built, batch=engine.batch).bound(feed)
        return
    from .families.source import load_reference, missing_device
    from .families.torch_call import placed

    if reason := missing_device(engine.device):
        raise ModelError(f"{reason}; install a CUDA build of PyTorch to time it on the GPU")
    revision, variant = engine.files
    reference = load_reference(engine.model, revision=revision, variant=variant, lora=engine.lora, place=Path(engine.folder))
    with reference.on(engine.device):
        network = reference.forward if engine.runs_on[2] == "fp32" else reference.in_dtype(engine.runs_on[2])
        yield partial(network, placed(feed, engine.device))


def _backend(engine: Timed) -> Backend:
    return next(backend for backend in BACKENDS if _key(backend) == engine.runs_on)


def _import_libraries(engines: Sequence[Timed]) -> None:
    """Import before the forks what each of them would import; the fork says what is missing."""
    for name in dict.fromkeys(name for engine in engines for name in LIBRARIES.get(engine.runs_on[0], ())):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, so that no killed run leaves gigabytes behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _resident() -> float:
    """MB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


if __name__ == "__main__":
    with open(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        serve(answers, sys.stdin.read())
