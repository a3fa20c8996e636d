"""Plans of TensorRT and TensorRT-RTX in ONNX Runtime: its providers load what `--format trt` and `trt-rtx` build.

A provider that builds a plan itself keeps no list of its kernels, so nothing could be audited. The builder here writes the
list, and both providers take its plan as one EPContext operator.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dq_export.core.documents import printable
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe, RecipeError

from ..backend import BackendError, Built
from ..packages import require_packages
from ..tensorrt.backend import TensorRt, TensorRtRtx
from ..tensorrt.plan import Plan
from ..tensorrt.runner import compute_capability, require_target, runs_on
from . import cuda, rtx_plugin
from .context import CONTEXT, write_context
from .cpu import PROVIDERS, OrtEngine, new_session, onnxruntime, session_errors, session_options

TENSORRT = "TensorrtExecutionProvider"


@dataclass(frozen=True)
class OrtPlan(TensorRt):
    """A plan in a session of ONNX Runtime. A build also writes `context.onnx`, which sessions load."""

    name: ClassVar[str] = "ort"
    triton: ClassVar[str] = ""
    execution_provider: ClassVar[str]
    """The provider's name in ONNX Runtime."""
    memory: ClassVar[tuple[str, int, int]]
    """See `OrtEngine.memory`."""

    @property
    @abstractmethod
    def obstacle(self) -> str:
        """The reason that no session stays on the provider here; empty if one does."""

    @abstractmethod
    def _session(self, context: Path) -> Any:
        """A session of `context.onnx` with the provider first."""

    @property
    def runs(self) -> bool:
        """Whether this machine has the provider, and a GPU that a plan for the targets runs on."""
        return not self.obstacle and runs_on(self.targets, compute_capability())

    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> Built:
        """Build the plan, and write the graph that names it.

        Raises:
            NotHereError, BackendError: see `TensorRt.build`.
        """
        built = super().build(model, folder, progress)
        write_context(model, Plan(built).file, self.execution_provider)
        return built

    def load(self, built: Built, *, batch: int | None = None) -> OrtEngine:
        """A session of the plan. It takes the batches that the plan was built for.

        Raises:
            BackendError: the plan is missing, damaged or for other GPUs, or the provider is missing or refuses it.
        """
        plan, context = Plan(built), built.folder / CONTEXT
        plan.require_unchanged()
        if not context.exists():
            raise BackendError(f"{built.folder}: no {CONTEXT}; {plan.advice}")
        if reason := self.obstacle:
            raise BackendError(f"{reason}; {self.title} is needed to run {plan.file}")
        require_target(tuple(plan.description["targets"]), compute_capability())
        try:
            session = self._session(context)
        except session_errors() as error:
            raise BackendError(f"{self.title} refuses {plan.file}: {printable(str(error))}") from error
        if self.execution_provider not in session.get_providers():
            raise BackendError(f"{self.title} does not take {plan.file}; ONNX Runtime would run it on {session.get_providers()}")
        return OrtEngine(session=session, memory=self.memory)


@dataclass(frozen=True)
class OrtTensorRt(OrtPlan):
    """ONNX Runtime's TensorRT provider, with plans of TensorRT."""

    provider: ClassVar[str | None] = "tensorrt"
    title: ClassVar[str] = "ONNX Runtime's TensorRT provider"
    packages: ClassVar[tuple[str, ...]] = (*TensorRt.packages, "onnxruntime-gpu")
    install: ClassVar[str] = "pip install 'dq-export[gpu,trt]'"
    execution_provider: ClassVar[str] = TENSORRT
    memory: ClassVar[tuple[str, int, int]] = cuda.MEMORY

    @property
    def obstacle(self) -> str:
        """The reason that no session stays on the provider here; empty if one does."""
        ort = onnxruntime()
        if TENSORRT not in ort.get_available_providers():
            return f"onnxruntime {ort.__version__} without its TensorRT provider is installed here; {self.install}"
        return "" if compute_capability() else "this machine shows no NVIDIA GPU"

    def _session(self, context: Path) -> Any:
        return new_session(context, session_options(optimize=True), providers=[TENSORRT, *PROVIDERS])


@dataclass(frozen=True)
class OrtTensorRtRtx(OrtPlan, TensorRtRtx):
    """ONNX Runtime's plug-in of TensorRT-RTX, with plans of TensorRT-RTX."""

    provider: ClassVar[str | None] = "tensorrt-rtx"
    title: ClassVar[str] = "ONNX Runtime's TensorRT-RTX provider"
    packages: ClassVar[tuple[str, ...]] = (
        *TensorRtRtx.packages,
        "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    )
    install: ClassVar[str] = "pip install 'dq-export[cpu,rtx,rtx-provider]'"
    execution_provider: ClassVar[str] = rtx_plugin.PROVIDER
    memory: ClassVar[tuple[str, int, int]] = rtx_plugin.MEMORY

    @property
    def obstacle(self) -> str:
        """The reason that no session stays on the provider here; empty if one does."""
        return rtx_plugin.obstacle()

    def configured(self, recipe: Recipe) -> TensorRtRtx:
        """The backend with the recipe's targets and shapes.

        Raises:
            RecipeError: the plug-in does not run on a target, or see `TensorRtRtx.configured`.
        """
        configured = super().configured(recipe)
        if other := [target for target in configured.targets if target not in rtx_plugin.TARGETS]:
            runs_on = ", ".join(rtx_plugin.TARGETS)
            raise RecipeError(f"--target {other[0]}: --provider tensorrt-rtx runs on {runs_on}; --format trt-rtx on others, too")
        return configured

    def require(self) -> None:
        """Check that the builder is installed; on a machine with an NVIDIA GPU the plug-in, too."""
        plugin = [rtx_plugin.MODULE] if compute_capability() else []
        require_packages([self.module, "onnxruntime", *plugin], "--provider tensorrt-rtx")

    def _session(self, context: Path) -> Any:
        options = session_options(optimize=True)
        options.add_provider_for_devices(rtx_plugin.gpus()[:1], {})
        return onnxruntime().InferenceSession(str(context), options)
