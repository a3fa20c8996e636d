"""Build one TensorRT or TensorRT-RTX plan in a separate process, which isolates aborts and memory."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from dq_export.core.progress import Advance

from ..backend import BackendError
from ..child import run_child

Shape = tuple[int, ...]
Tell = Callable[[dict[str, Any]], None]
TIMINGS = "timing.cache"
PHASES = 1000
"""The number of parts of a build's progress."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The request to build a plan.

    Args:
        module: `tensorrt` or `tensorrt_rtx`; their builders differ only in the targets.
        model: absolute path of the ONNX file.
        plan: absolute path of the plan to write.
        targets: compute capabilities such as `SM89`, for tensorrt_rtx; tensorrt builds for the GPU of the machine.
        profiles: input name -> (least, best, greatest) shape.
    """

    module: str
    model: str
    plan: str
    targets: tuple[str, ...]
    profiles: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """The result of a build.

    Args:
        version: version of the library.
        seconds: time of parsing and building.
        peak_bytes: peak memory of the build process.
        sha256: digest of the plan.
        layers: the builder's own list of layers, unchanged.
    """

    version: str
    seconds: float
    peak_bytes: int
    sha256: str
    layers: str


def build_plan(request: PlanRequest, progress: Advance) -> PlanReport:
    """Build in a child process.

    Raises:
        BackendError: the library is missing, refuses the graph or a target, or the process was killed.
    """
    last: dict[str, Any] = {}

    def receive(message: dict[str, Any]) -> None:
        last.clear()
        last.update(message)
        if "done" in message:
            progress(message["done"], PHASES)

    end = run_child("dq_export.deploy.tensorrt.builder", asdict(request), receive)
    if "layers" in last:
        return PlanReport(**last)
    if "error" in last:
        raise BackendError(f"{request.module} cannot build {request.model}: {last['error']}")
    if end.status == -signal.SIGKILL:
        raise BackendError(
            f"the process that builds {request.model} was killed, most likely for lack of memory: a build takes 3 to 4 times "
            "the bytes of model.onnx.data; finished stages are kept"
        )
    raise BackendError(f"the process that builds {request.model} ended with status {end.status}: {end.reason}")


def serve(channel: TextIO, text: str) -> None:
    """The child process: answer a request with progress and then the report or the error, one JSON line each."""

    def tell(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    raw = json.loads(text)
    profiles: Any = {name: tuple(tuple(shape) for shape in shapes) for name, shapes in raw.pop("profiles").items()}
    request = PlanRequest(profiles=profiles, **raw)
    try:
        library = importlib.import_module(request.module)
        start = time.monotonic()
        content, layers = _build(library, request, tell)
    except (ImportError, PlanError) as error:
        tell({"error": str(error)})
        return
    Path(request.plan).write_bytes(content)
    report = PlanReport(
        version=library.__version__,
        seconds=round(time.monotonic() - start, 2),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        sha256=hashlib.sha256(content).hexdigest(),
        layers=layers,
    )
    tell(asdict(report))


class PlanError(Exception):
    """The library refuses the graph; the message is the library's."""


def _build(library: Any, request: PlanRequest, tell: Tell) -> tuple[bytes, str]:
    """The plan, and the builder's list of layers (empty if the library prints none)."""
    messages: list[tuple[str, str]] = []

    class Log(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append((severity.name, message))

    log = Log()
    builder = library.Builder(log)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log)
    if not parser.parse_from_file(request.model):
        raise PlanError("; ".join(_described(parser.get_error(index)) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED  # only this level prints the list of layers
    config.progress_monitor = _monitor(library, tell)
    if request.targets and hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = len(request.targets)
        for index, target in enumerate(request.targets):
            config.set_compute_capability(getattr(library.ComputeCapability, target), index)
    profile = builder.create_optimization_profile()
    for name, shapes in request.profiles.items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    cached = None if hasattr(config, "set_compute_capability") else _timing_cache(config, Path(request.model).with_name(TIMINGS))
    built = builder.build_serialized_network(network, config)
    if cached is not None and built is not None:
        Path(request.model).with_name(TIMINGS).write_bytes(bytes(cached.serialize()))
    if built is None:
        raise PlanError("; ".join(text for severity, text in messages if severity == "ERROR") or "no plan, and no reason given")
    content = bytes(built)
    layers = next((text for _, text in messages if text.startswith("Layers:")), "")
    return content, layers or _inspected(library, log, content)


def _timing_cache(config: Any, path: Path) -> Any:
    """TensorRT's measurements of earlier builds, from a file beside the graph; TensorRT-RTX measures nothing."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _inspected(library: Any, log: Any, plan: bytes) -> str:
    """The list of layers from the engine inspector, for a builder that does not print it; needs the GPU."""
    engine = library.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanError("the plan was built, but this machine cannot read it to see which kernels it runs")
    text: str = engine.create_engine_inspector().get_engine_information(library.LayerInformationFormat.ONELINE)
    return text


def _described(error: Any) -> str:
    return f"{error.code().name} at node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"


def _monitor(library: Any, tell: Tell) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Sends the progress of the outermost phase."""

        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.outer, self.steps = "", 1

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if not self.outer:
                self.outer, self.steps = name, max(steps, 1)

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outer:
                tell({"done": min(PHASES, (step + 1) * PHASES // self.steps)})
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


if __name__ == "__main__":
    with open(int(sys.argv[1]), "w") as answers:
        serve(answers, sys.stdin.read())
