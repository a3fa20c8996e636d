"""TensorRT and TensorRT-RTX: one builder for two libraries, which differ in their targets and in where a plan can be read."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.progress import Advance, unwatched
from dq_export.core.qtypes import FP8, INT4, QuantType
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.rule import Rule
from dq_export.core.scheme import PRESETS, Scheme, scheme_of
from dq_export.passes.base import GraphPass, run_passes
from dq_export.passes.legalise.cast_floats import CastFloats
from dq_export.passes.legalise.quantize_attention import QuantizeAttention
from dq_export.passes.legalise.widen_codes import WidenCodes
from dq_export.passes.legalise.widen_floats import WidenFloats
from dq_export.passes.pipeline import factoring_passes
from dq_export.passes.sizes import input_sizes

from ..audit import Audit, audit_graph
from ..backend import Backend, BackendError, Built, Engine, NotHereError, Reader
from ..check import Finding, check
from ..check import Target as CheckTarget
from ..check.rules_nvidia import TARGETS
from ..lowerings import ANY_KERNEL, Lowering, Refusal, integer_gemm
from ..packages import require_packages
from .builder import PlanRequest, build_plan
from .layers import kernel_of
from .plan import PLAN, Plan
from .profiles import profiles
from .runner import compute_capability, load_plan, runs_on

SMALL = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
HALF = 65504.0
"""The greatest finite float16 number."""
FIRST_TARGET = {FP8.name: "sm89", INT4.name: "sm80", "bf16": "sm80"}
"""The first target whose GEMMs support an element type."""


@dataclass(frozen=True)
class TensorRt(Backend):
    """TensorRT, which builds for the GPU of this machine.

    A build writes `model.plan`, the builder's list of layers, and `plan.json`, which describes the plan.

    Args:
        targets: compute capabilities that the plan supports; empty for the GPU of this machine.
        shapes: least, best and greatest, in trtexec's syntax.
    """

    name: ClassVar[str] = "trt"
    title: ClassVar[str] = "TensorRT"
    packages: ClassVar[tuple[str, ...]] = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
    triton: ClassVar[str] = "tensorrt"
    attention: ClassVar[tuple[str, ...]] = ("float", "fp8")
    device: ClassVar[str] = "cuda"
    module: ClassVar[str] = "tensorrt"
    """The Python module of the library."""
    install: ClassVar[str] = "pip install 'dq-export[trt]'"
    checked_as: ClassVar[CheckTarget] = "trt"
    """The name of the backend's rules in the static checker."""

    targets: tuple[str, ...] = ()
    shapes: tuple[str, str, str] = ("", "", "")

    @property
    def runs(self) -> bool:
        """Whether this machine has a GPU and the library."""
        return bool(compute_capability()) and importlib.util.find_spec(self.module) is not None

    def configured(self, recipe: Recipe) -> TensorRt:
        """The backend with the recipe's shapes."""
        return replace(self, shapes=(recipe.min_shapes, recipe.opt_shapes, recipe.max_shapes))

    def require(self) -> None:
        """Check nothing: everything except the build works without TensorRT, which may be installed on another machine."""

    def shared_timesteps(self, choice: str) -> bool:
        """Whether the batch shares one timestep. `auto` means a timestep for each sample: it costs nothing, and a batch may mix
        steps."""
        return choice == "shared"

    def supports(self, scheme: Scheme) -> Lowering | Refusal:
        """The lowering that runs a scheme on every target, or the reason that there is none."""
        weight, activation = scheme.weight, scheme.activation
        if weight is None or not scheme.low_precision:
            return ANY_KERNEL
        if activation is None:
            return self._unpacked(scheme, weight.qtype)
        if activation.granularity == "token-group":
            return Refusal("an integer GEMM has one scale per token", scheme_of(scheme.name, "token"))
        if not activation.qtype.is_float:
            return integer_gemm(scheme, "Int8xInt8")
        if scheme.per_token:
            return Refusal("float8 keeps its precision over 15 octaves and needs no scale for each token", PRESETS[scheme.name])
        problem = self._too_old(scheme.name, activation.qtype.name)
        return Refusal(problem, PRESETS["w8a8"]) if problem else Lowering("one float8 GEMM", "FP8xFP8")

    def _unpacked(self, scheme: Scheme, qtype: QuantType) -> Lowering | Refusal:
        """The same for schemes that quantize only weights."""
        if qtype != INT4:
            return Refusal(f"{qtype.name} blocks are unpacked by a separate kernel", PRESETS["w4a16"])
        problem = self._too_old(scheme.name, qtype.name)
        return Refusal(problem, PRESETS["w4a8"]) if problem else Lowering("int4 blocks unpacked inside the GEMM", "Int4")

    def _too_old(self, subject: str, element_type: str) -> str:
        """The reason that the oldest target does not run GEMMs of an element type; empty if it does."""
        lowest = min(self.targets, key=TARGETS.index, default=TARGETS[-1])
        first = FIRST_TARGET.get(element_type, TARGETS[0])
        old = TARGETS.index(lowest) < TARGETS.index(first)
        return f"{subject} needs --target {first} or later, found {lowest}" if old else ""

    def legalise(self, *, shared: bool, result: CalibrationResult) -> tuple[GraphPass, ...]:
        """Factored form: a GEMM with a scale that is computed at run time builds, but runs in half precision."""
        limit = HALF / 2 if self.dtype == "fp16" else math.inf  # headroom of 2 for activations that calibration did not see
        return (
            WidenCodes(),
            QuantizeAttention(scales=result.attention),
            *factoring_passes(result, limit=limit),
            *self._casts(),
        )

    def _casts(self) -> tuple[GraphPass, ...]:
        return (CastFloats(dtype=SMALL[self.dtype]),) if self.dtype in SMALL else ()

    def greatest_batch(self, model: Path) -> int | None:
        """The smallest of the greatest batches of all inputs."""
        return min(greatest[0] for _, _, greatest in profiles(input_sizes(ir.load(model)), self.shapes).values())

    def portable(self, model: Path, folder: Path) -> Path:
        """`model`; for bf16, which ONNX Runtime's CPU provider does not run, a copy in float32."""
        if self.dtype != "bf16":
            return model
        graph = ir.load(model)
        run_passes(graph, [WidenFloats()])
        folder.mkdir(parents=True, exist_ok=True)
        ir.save(graph, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
        return folder / "model.onnx"

    def baseline(self, model: Path, read: Reader, folder: Path) -> Built:
        """A copy of the float graph in `dtype`, and its plan."""
        graph = read(model)
        run_passes(graph, self._casts())
        folder.mkdir(parents=True, exist_ok=True)
        ir.save(graph, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
        return self.build(folder / "model.onnx", folder / "engine")

    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> Built:
        """Build the plan in a separate process.

        Raises:
            NotHereError: TensorRT is not installed on this machine.
            BackendError: the graph, a shape or a target is refused.
        """
        folder.mkdir(parents=True, exist_ok=True)
        graph = ir.load(model)
        faults = [f"'{item.node}': {item.rule}; {item.fix}" for item in self._check(graph) if item.verdict == "rejected"]
        if faults:
            raise BackendError(f"{model} will not build for --format {self.name}:\n  " + "\n  ".join(faults))
        ranges = profiles(input_sizes(graph), self.shapes)
        if importlib.util.find_spec(self.module) is None:
            raise NotHereError(
                f"{self.module} is not installed here; {model.parent} is finished up to the graph. Copy the folder to the "
                f"GPU machine and run there:\n  {self.install} && dq-export finish {model.parent}"
            )
        request = PlanRequest(
            module=self.module,
            model=str(model.resolve()),
            plan=str((folder / PLAN).resolve()),
            targets=tuple(target.upper() for target in self.targets),
            profiles=ranges,
        )
        built = Built(model=model, folder=folder)
        report = build_plan(request, progress)
        origin = dict(graph.metadata_props)
        Plan(built).describe(request, report, targets=self.targets, dtype=self.dtype, origin=origin)
        return built

    def load(self, built: Built, *, batch: int | None = None) -> Engine:
        """Load the plan on an NVIDIA GPU. It takes the batches that it was built for.

        Raises:
            BackendError: the plan is missing, damaged, or of another library, version or GPU.
        """
        plan = Plan(built)
        description = plan.description
        if importlib.util.find_spec(self.module) is None:
            raise BackendError(f"{self.module} is not installed; {self.install}, needed to run {plan.file}")
        library = f"{self.module} {importlib.import_module(self.module).__version__}"
        if description["library"] != library:
            raise BackendError(
                f"{plan.file} was built by {description['library']}, but {library} is installed here; {plan.advice}"
            )
        return load_plan(plan.content(), tuple(description["targets"]), rtx=self.checked_as == "trt-rtx")

    def audit(self, built: Built, assigned: Mapping[str, Rule]) -> Audit:
        """Audit by the builder's list of layers.

        Raises:
            BackendError: the list is missing or damaged.
        """
        layers = Plan(built).layers()

        def kernel(name: str) -> tuple[str, bool]:
            label, precision = kernel_of(layers, name)
            return label, bool(precision)

        rules = {item.node: item.rule for item in self._check(ir.load(built.model))}

        def reason(node: ir.Node, kernel: str) -> str:
            return rules.get(str(node.name)) or f"the builder chose {kernel}; no known rule says why"

        return audit_graph(built.model, assigned, kernel, reason)

    def _check(self, graph: ir.Model) -> list[Finding]:
        return check(graph, self.checked_as, self.targets)


@dataclass(frozen=True)
class TensorRtRtx(TensorRt):
    """TensorRT-RTX, which builds one plan for several kinds of GPU on any machine.

    Args:
        targets: sm75 … sm121.
    """

    name: ClassVar[str] = "trt-rtx"
    title: ClassVar[str] = "TensorRT-RTX"
    packages: ClassVar[tuple[str, ...]] = ("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13")
    triton: ClassVar[str] = ""  # Triton's tensorrt backend loads only plans of TensorRT
    module: ClassVar[str] = "tensorrt_rtx"
    install: ClassVar[str] = "pip install 'dq-export[rtx]'"
    checked_as: ClassVar[CheckTarget] = "trt-rtx"

    @property
    def runs(self) -> bool:
        """Whether this machine has the library, and a GPU that a plan for the targets runs on."""
        return super().runs and runs_on(self.targets, compute_capability())

    def configured(self, recipe: Recipe) -> TensorRtRtx:
        """The backend with the recipe's targets and shapes.

        Raises:
            RecipeError: a target is unknown, or does not have the element types that the recipe needs.
        """
        targets = tuple(part.strip().lower() for part in recipe.target.split(","))
        for target in targets:
            if target not in TARGETS:
                raise RecipeError(f"--target '{target}': TensorRT-RTX builds for {', '.join(TARGETS)}")
        shapes = (recipe.min_shapes, recipe.opt_shapes, recipe.max_shapes)
        configured = replace(self, targets=targets, shapes=shapes)
        codes = recipe.attention_type
        attention = configured._too_old(f"--attention {recipe.attention}", codes.name) if codes is not None else ""
        if problem := attention or configured._too_old(f"--dtype {self.dtype}", self.dtype):
            raise RecipeError(problem)
        return configured

    def require(self) -> None:
        """Check that the library is installed."""
        require_packages([self.module], f"--format {self.name}")
