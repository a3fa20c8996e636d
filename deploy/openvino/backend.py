"""OpenVINO on the CPU: as an execution provider of ONNX Runtime (plugin onnxruntime-ep-openvino), or by itself.

The plugin takes Intel processors only. OpenVINO has integer kernels for others, too, so there its own runtime runs the graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.documents import DocumentError, read_json, shown_path
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe, Rule
from dq_export.passes.base import GraphPass
from dq_export.passes.legalise.factor_scale import FactorScale

from ..audit import Audit, audit_graph
from ..backend import BackendError, Engine, Feed, Reader
from ..lowerings import Target, require_lowerings
from ..onnxruntime.cpu import OrtEngine, onnxruntime, session_errors
from ..packages import require_packages
from .engine import OpenVinoEngine, load_engine, openvino

PROVIDER = "OpenVINOExecutionProvider"
KERNELS = "kernels.json"
INTEGER = ("i8", "u8")
ALONE = "by OpenVINO's own runtime: ONNX Runtime's plugin takes Intel processors only"


@dataclass(frozen=True)
class OpenVino:
    """See `Backend`. Builds leave `engine/kernels.json`: OpenVINO's own list of what it compiled the graph to.

    Args:
        dtype: fp32 or bf16, of what is not quantized.
    """

    dtype: str = "fp32"
    name: str = "ort"
    provider: str = "openvino"
    target: Target = "openvino"
    title: str = "OpenVINO"
    packages: tuple[str, ...] = ("openvino", "onnxruntime-ep-openvino")
    triton: str = ""
    runs: bool = True

    @property
    def _config(self) -> dict[str, str]:
        return {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[self.dtype]}

    def configured(self, recipe: Recipe) -> OpenVino:
        """See `Backend.configured`."""
        return self

    def require(self) -> None:
        """See `Backend.require`."""
        require_packages(["openvino", "onnxruntime_ep_openvino", "onnxruntime"], "--provider openvino")
        _devices(onnxruntime())

    def require_rules(self, rules: Iterable[Rule]) -> None:
        """See `Backend.require_rules`."""
        require_lowerings(self.target, rules)

    def shared_timesteps(self, wanted: str) -> bool:
        """Shared unless asked for otherwise."""
        return wanted != "per-sample"

    def legalise(self, *, shared: bool, result: CalibrationResult) -> tuple[GraphPass, ...]:
        """Factored form: OpenVINO has no integer kernel for a scale that is computed at run time."""
        return (FactorScale(),)

    def greatest_batch(self, model: Path) -> int | None:
        """See `Backend.greatest_batch`."""
        return None

    def portable(self, model: Path, folder: Path) -> Path:
        """See `Backend.portable`."""
        return model

    def baseline(self, model: Path, read: Reader, folder: Path) -> Path:
        """See `Backend.baseline`."""
        return model

    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> str:
        """Load the graph once, and write what OpenVINO compiles it to.

        Raises:
            BackendError: a library is missing, or OpenVINO refuses the graph.
        """
        folder.mkdir(parents=True, exist_ok=True)
        engine = self.load(model)
        providers = engine.session.get_providers() if isinstance(engine, OrtEngine) else []
        own = engine if isinstance(engine, OpenVinoEngine) else load_engine(model, self._config, None)
        described = {
            "onnxruntime": onnxruntime().__version__,
            "openvino": openvino().__version__,
            "dtype": self.dtype,
            "providers": providers,
            "model": model.name,
        }
        (folder / "session.json").write_text(json.dumps(described, indent=2) + "\n")
        (folder / KERNELS).write_text(json.dumps(own.kernels(), indent=0, sort_keys=True) + "\n")
        return "" if providers else ALONE

    def load(self, model: Path, *, batch: int | None = None) -> Engine:
        """See `Backend.load`.

        Raises:
            BackendError: the plugin is missing, or OpenVINO does not take the graph.
        """
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

    def profile(self, model: Path, feed: Feed) -> dict[str, float]:
        """See `Backend.profile`. From OpenVINO's counters, for the feed's shapes; one call after two of warm-up."""
        request = load_engine(model, {**self._config, "PERF_COUNT": True}, len(feed["hidden_states"])).request
        for _ in range(3):
            request.infer(dict(feed))
        spent: dict[str, float] = {}
        for item in request.get_profiling_info():
            label = f"{item.node_type} {item.exec_type}"
            spent[label] = spent.get(label, 0.0) + item.real_time.total_seconds() * 1e3
        return {label: time for label, time in spent.items() if time > 0}

    def audit(self, model: Path, folder: Path, assigned: Mapping[str, Rule]) -> Audit:
        """See `Backend.audit`. By the names of the nodes that each compiled kernel stands for."""
        kernels = _read_kernels(folder / KERNELS)

        def kernel_of(name: str) -> tuple[str, bool]:
            kind, precision = kernels.get(name, ("not found", ""))
            return f"{kind} {precision}".strip(), precision in INTEGER

        return audit_graph(model, assigned, kernel_of, _why_float)


def _read_kernels(path: Path) -> dict[str, list[str]]:
    """Node name -> [layer type, precision].

    Raises:
        BackendError: the file is not what `build` wrote.
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
    """The processor, where the plugin takes it."""
    require_packages(["onnxruntime_ep_openvino"], "--provider openvino")
    import onnxruntime_ep_openvino as plugin

    _register(ort, plugin.get_library_path())
    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    return [device for device in found if device.device.type == ort.OrtHardwareDeviceType.CPU][:1]


@cache
def _register(ort: Any, library: str) -> None:
    ort.register_execution_provider_library("openvino", library)


def _why_float(node: ir.Node, kernel: str) -> str:
    return f"OpenVINO runs it as {kernel}; it wants constant scales and zero points of 0 on both inputs"
