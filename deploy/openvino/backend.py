"""OpenVINO on the CPU: as an execution provider of ONNX Runtime (plugin onnxruntime-ep-openvino), or by its own runtime.

The plugin supports only Intel processors. OpenVINO has integer kernels for others, too, so its own runtime runs the graph there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.documents import DocumentError, read_json, shown_path
from dq_export.core.network import batch_of
from dq_export.core.progress import Advance, unwatched
from dq_export.core.rule import Rule
from dq_export.core.scheme import PRESETS, Scheme
from dq_export.passes.base import GraphPass
from dq_export.passes.pipeline import factoring_passes

from ..audit import Audit, audit_graph
from ..backend import Backend, BackendError, Built, Engine, Feed
from ..lowerings import ANY_KERNEL, Lowering, Refusal, integer_gemm
from ..onnxruntime.cpu import OrtEngine, onnxruntime, session_errors
from ..packages import require_packages
from .engine import OpenVinoEngine, load_engine, openvino

PROVIDER = "OpenVINOExecutionProvider"
KERNELS = "kernels.json"
INTEGER = ("i8", "u8")
ALONE = "by OpenVINO's own runtime: ONNX Runtime's plugin takes Intel processors only"


@dataclass(frozen=True)
class OpenVino(Backend):
    """OpenVINO on the CPU. A build writes `kernels.json`: OpenVINO's own list of the kernels of the compiled graph.

    Args:
        dtype: fp32 or bf16, the type of everything that is not quantized.
    """

    name: ClassVar[str] = "ort"
    provider: ClassVar[str | None] = "openvino"
    title: ClassVar[str] = "OpenVINO"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnxruntime-ep-openvino")

    @property
    def _config(self) -> dict[str, str]:
        return {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[self.dtype]}

    def require(self) -> None:
        """Check that the libraries are installed, and register the plugin.

        Raises:
            BackendError: a library is missing.
        """
        require_packages(["openvino", "onnxruntime_ep_openvino", "onnxruntime"], "--provider openvino")
        _devices(onnxruntime())

    def supports(self, scheme: Scheme) -> Lowering | Refusal:
        """The kernel that runs a scheme, or why there is none."""
        if not scheme.low_precision:
            return ANY_KERNEL
        if scheme == PRESETS["w8a8"]:
            return integer_gemm(scheme, "FullyConnected")
        return Refusal("not measured there", PRESETS["w8a8"])

    def legalise(self, *, shared: bool, result: CalibrationResult) -> tuple[GraphPass, ...]:
        """Factored form: OpenVINO has no integer kernel for a scale that is computed at run time."""
        return factoring_passes(result)

    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> Built:
        """Load the graph once, and write the list of OpenVINO's kernels.

        Raises:
            BackendError: a library is missing, or OpenVINO refuses the graph.
        """
        folder.mkdir(parents=True, exist_ok=True)
        engine = self._open(model, None)
        providers = engine.session.get_providers() if isinstance(engine, OrtEngine) else []
        compiled = engine if isinstance(engine, OpenVinoEngine) else load_engine(model, self._config, None)
        description = {
            "onnxruntime": onnxruntime().__version__,
            "openvino": openvino().__version__,
            "dtype": self.dtype,
            "providers": providers,
            "model": model.name,
        }
        (folder / "session.json").write_text(json.dumps(description, indent=2) + "\n")
        (folder / KERNELS).write_text(json.dumps(compiled.kernels(), indent=0, sort_keys=True) + "\n")
        return Built(model=model, folder=folder, note="" if providers else ALONE)

    def load(self, built: Built, *, batch: int | None = None) -> Engine:
        """Compile the graph for any batch, or for a fixed batch, which OpenVINO runs faster.

        Raises:
            BackendError: the plugin is missing, or OpenVINO refuses the graph.
        """
        return self._open(built.model, batch)

    def _open(self, model: Path, batch: int | None) -> Engine:
        ort = onnxruntime()
        devices = _devices(ort)
        if not devices:
            return load_engine(model, self._config, batch)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if batch is not None:
            options.add_free_dimension_override_by_name("batch", batch)
        options.add_provider_for_devices(devices, {"load_config": json.dumps({"CPU": self._config})})
        try:
            session = ort.InferenceSession(str(model), options)
        except session_errors() as error:
            raise BackendError(f"OpenVINO refuses {model}: {error}") from error
        if PROVIDER not in session.get_providers():
            raise BackendError(f"OpenVINO does not take {model}; ONNX Runtime would run it on {session.get_providers()}")
        return OrtEngine(session=session)

    def profile(self, built: Built, feed: Feed) -> dict[str, float]:
        """Milliseconds by kernel from OpenVINO's counters, for the feed's shapes; one call after two calls of warm-up."""
        request = load_engine(built.model, {**self._config, "PERF_COUNT": True}, batch_of(feed)).request
        for _ in range(3):
            request.infer(dict(feed))
        milliseconds: dict[str, float] = {}
        for item in request.get_profiling_info():
            label = f"{item.node_type} {item.exec_type}"
            milliseconds[label] = milliseconds.get(label, 0.0) + item.real_time.total_seconds() * 1e3
        return {label: time for label, time in milliseconds.items() if time > 0}

    def audit(self, built: Built, assigned: Mapping[str, Rule]) -> Audit:
        """Audit by the names of the nodes from which each kernel was compiled.

        Raises:
            BackendError: the list of kernels is missing or damaged.
        """
        kernels = _read_kernels(built.folder / KERNELS)

        def kernel_of(name: str) -> tuple[str, bool]:
            kind, precision = kernels.get(name, ("not found", ""))
            return f"{kind} {precision}".strip(), precision in INTEGER

        return audit_graph(built.model, assigned, kernel_of, _why_float)


def _read_kernels(path: Path) -> dict[str, list[str]]:
    """Node name -> [layer type, precision].

    Raises:
        BackendError: the file is damaged.
    """
    try:
        kernels = read_json(path, links=False)
    except DocumentError as error:
        raise BackendError(f"{error}; build the engine again") from error
    rows = kernels.values() if isinstance(kernels, dict) else [None]
    if not all(isinstance(row, list) and len(row) == 2 and all(isinstance(word, str) for word in row) for row in rows):
        raise BackendError(f"{shown_path(path)}: expected a layer type and a precision for each node; build the engine again")
    return dict(kernels)


def _devices(ort: Any) -> list[Any]:
    """The processor, if the plugin supports it."""
    require_packages(["onnxruntime_ep_openvino"], "--provider openvino")
    import onnxruntime_ep_openvino as plugin

    _register(ort, plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    return [device for device in devices if device.device.type == ort.OrtHardwareDeviceType.CPU][:1]


@cache
def _register(ort: Any, library: str) -> None:
    ort.register_execution_provider_library("openvino", library)


def _why_float(node: ir.Node, kernel: str) -> str:
    return f"OpenVINO runs it as {kernel}; it needs constant scales and zero points of 0 on both inputs"
