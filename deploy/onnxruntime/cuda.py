"""ONNX Runtime on an NVIDIA GPU, by its CUDA provider."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.documents import DocumentError, read_json, shown_path
from dq_export.core.progress import Advance, unwatched
from dq_export.core.qtypes import INT4
from dq_export.core.rule import Rule
from dq_export.core.scheme import PRESETS, Scheme
from dq_export.passes.base import GraphPass
from dq_export.passes.legalise.cast_floats import CastFloats

from ..audit import Audit
from ..backend import BackendError, Built, NotHereError
from ..lowerings import ANY_KERNEL, Lowering, Refusal, unpacked_blocks
from .cpu import PROVIDERS, Ort, OrtEngine, new_session, onnxruntime, session_options

PROVIDER = "CUDAExecutionProvider"
MEMORY = ("cuda", 0, -1)
"""The first GPU's memory."""
NODES = "nodes.json"
"""The file with the names of the nodes that the provider took."""


@dataclass(frozen=True)
class OrtCuda(Ort):
    """ONNX Runtime's CUDA provider. It has no integer GEMM for Q/DQ, so only weights are quantized.

    A build writes the files of the CPU provider's, and `nodes.json`: the CPU provider silently takes nodes that the GPU does not.

    Args:
        dtype: fp16 or fp32, the type of everything that is not quantized.
    """

    name: ClassVar[str] = "ort"
    provider: ClassVar[str | None] = "cuda"
    title: ClassVar[str] = "ONNX Runtime's CUDA provider"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime-gpu",)
    device: ClassVar[str] = "cuda"
    triton: ClassVar[str] = ""

    @property
    def runs(self) -> bool:
        """Whether a session stays on the provider here."""
        return not obstacle()

    def supports(self, scheme: Scheme) -> Lowering | Refusal:
        """The kernel that runs a scheme, or the reason that there is none."""
        weight = scheme.weight
        if weight is None or not scheme.low_precision:
            return ANY_KERNEL
        if scheme.activation is not None:
            nearest = PRESETS["w4a16" if weight.qtype == INT4 else "w8a16"]
            return Refusal("it has no integer or float8 GEMM for Q/DQ; --provider tensorrt and tensorrt-rtx have", nearest)
        return unpacked_blocks(scheme)

    def legalise(self, *, shared: bool, result: CalibrationResult) -> tuple[GraphPass, ...]:
        """The passes of the CPU provider, and one that computes everything that is not quantized in `dtype`."""
        return (CastFloats(dtype=ir.DataType.FLOAT16),) if self.dtype == "fp16" else ()

    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> Built:
        """Create the session once, as the CPU provider's build does, and record the nodes that the GPU takes.

        Raises:
            NotHereError: this machine has no GPU, or ONNX Runtime lacks its CUDA provider.
            BackendError: ONNX Runtime refuses the graph.
        """
        if reason := obstacle():
            raise NotHereError(
                f"{reason}; {model.parent} is finished up to the graph. Copy the folder to the GPU machine and run there:\n"
                f"  pip install 'dq-export[gpu]' && dq-export finish {model.parent}"
            )
        built = super().build(model, folder, progress)
        options = session_options(optimize=True)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        parts = self._session(model, options).get_provider_graph_assignment_info()
        names = sorted(node.name for part in parts if part.ep_name == PROVIDER for node in part.get_nodes())
        (folder / NODES).write_text(json.dumps(names, indent=0) + "\n")
        return built

    def load(self, built: Built, *, batch: int | None = None) -> OrtEngine:
        """A session of the graph on the GPU; it takes any batch.

        Raises:
            BackendError: there is none here.
        """
        if reason := obstacle():
            raise BackendError(f"{reason}, needed to run {built.model}")
        return OrtEngine(session=self._session(built.model, session_options(optimize=True)), memory=MEMORY)

    def audit(self, built: Built, assigned: Mapping[str, Rule]) -> Audit:
        """Audit as the CPU provider does; nodes that the GPU did not take count as float.

        Raises:
            BackendError: a file of the build is missing or damaged.
        """
        path = built.folder / NODES
        try:
            names = read_json(path, links=False)
        except DocumentError as error:
            raise BackendError(f"{error}; build the engine again") from error
        if not isinstance(names, list):
            raise BackendError(f"{shown_path(path)}: expected a list of names; build the engine again")
        reason = "the provider did not take it, and the CPU runs it"
        gemms = super().audit(built, assigned).gemms
        return Audit.of(g if g.name in names else replace(g, integer=False, reason=reason if g.required else "") for g in gemms)

    def _session(self, model: Path, options: Any) -> Any:
        return new_session(model, options, providers=[PROVIDER, *PROVIDERS])


@cache
def obstacle() -> str:
    """The reason that no session stays on the provider here; empty if one does.

    ONNX Runtime itself only warns, and runs the graph on the CPU.
    """
    ort = onnxruntime()
    if PROVIDER not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} without its CUDA provider is installed here"
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        return f"onnxruntime {ort.__version__} here does not list the nodes that its CUDA provider takes; a later version does"
    session = ort.InferenceSession(_identity(), session_options(optimize=True), providers=[PROVIDER, *PROVIDERS])
    if session.get_providers()[0] != PROVIDER:
        return f"onnxruntime {ort.__version__} cannot load its CUDA provider here: no GPU, or not its versions of CUDA and cuDNN"
    return ""


def _identity() -> bytes:
    """The smallest graph."""
    value = ir.val("x", dtype=ir.DataType.FLOAT, shape=[1])
    node = ir.node("Identity", [value], name="identity")
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph = ir.Graph([value], node.outputs, nodes=[node], name="probe", opset_imports={"": 21})
    content: bytes = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    return content
