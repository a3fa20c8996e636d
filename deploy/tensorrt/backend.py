"""TensorRT and TensorRT-RTX: one builder, two libraries (they differ in targets and in where a plan can be read)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.documents import DocumentError, printable, read_json, read_text, shown_path
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe, RecipeError, Rule
from dq_export.passes.base import GraphPass, run_passes
from dq_export.passes.legalise.cast_floats import CastFloats
from dq_export.passes.legalise.factor_scale import FactorScale
from dq_export.passes.legalise.quantize_attention import QuantizeAttention
from dq_export.passes.legalise.widen_codes import WidenCodes
from dq_export.passes.legalise.widen_floats import WidenFloats

from ..audit import Audit, audit_graph
from ..backend import BackendError, Engine, Feed, NotHereError, Reader
from ..check import Finding, check
from ..check.operand import shape_of
from ..check.rules_nvidia import TARGETS
from ..lowerings import Target, require_lowerings
from ..packages import require_packages
from .builder import PlanRequest, build_plan
from .layers import kernel_of, read_layers
from .profiles import profiles
from .runner import compute_capability, load_plan

PLAN, LAYERS, METADATA = "model.plan", "layers.txt", "plan.json"
LAYERS_LIMIT = 256 << 20
"""Bytes of the list of layers; DiT-XL/2's has 2 million."""
SMALL = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
HALF = 65504.0
"""The greatest float16."""
MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}
SINCE = {"fp8": "sm89", "w4a16": "sm80", "bf16": "sm80"}
"""The first target that has the element types of an action, a dtype or an attention."""
INSTALL = {"trt": "pip install 'dq-export[trt]'", "trt-rtx": "pip install 'dq-export[rtx]'"}


@dataclass(frozen=True, kw_only=True)
class TensorRt:
    """See `Backend`. Builds leave `engine/model.plan`, the builder's list of layers, and `plan.json` beside it.

    Args:
        name: `trt` or `trt-rtx`.
        targets: of trt-rtx: sm75 … sm121; one plan serves them all.
        shapes: least, best and greatest, in trtexec's syntax.
    """

    name: str
    dtype: str
    targets: tuple[str, ...] = ()
    shapes: tuple[str, str, str] = ("", "", "")
    provider: str | None = None
    target: Target = "trt"

    @property
    def title(self) -> str:
        """See `Backend.title`."""
        return "TensorRT" if self.name == "trt" else "TensorRT-RTX"

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Backend.packages`."""
        return tuple(f"tensorrt{'' if self.name == 'trt' else '-rtx'}{suffix}" for suffix in ("", "-cu12", "-cu13"))

    @property
    def triton(self) -> str:
        """Triton's tensorrt backend loads TensorRT's plans, not those of TensorRT-RTX."""
        return "tensorrt" if self.name == "trt" else ""

    @property
    def runs(self) -> bool:
        """Where there are a GPU and the library."""
        return bool(compute_capability()) and importlib.util.find_spec(MODULES[self.name]) is not None

    def configured(self, recipe: Recipe) -> TensorRt:
        """With the recipe's targets and shapes.

        Raises:
            RecipeError: an unknown target, or one that has not the element types.
        """
        targets = tuple(part.strip().lower() for part in recipe.target.split(",")) if self.name == "trt-rtx" else ()
        for target in targets:
            if target not in TARGETS:
                raise RecipeError(f"--target '{target}': TensorRT-RTX builds for {', '.join(TARGETS)}")
        found = replace(self, targets=targets, shapes=(recipe.min_shapes, recipe.opt_shapes, recipe.max_shapes))
        bits = [f"--bits {recipe.bits}"] if recipe.rules is None else []  # rules decide, where a recipe has them
        found._require_targets([*bits, f"--attention {recipe.attention}", f"--dtype {self.dtype}"])
        return found

    def require(self) -> None:
        """See `Backend.require`. TensorRT may be missing: all but its build is done without it."""
        if self.name == "trt-rtx":
            require_packages(["tensorrt_rtx"], "--format trt-rtx")

    def require_rules(self, rules: Iterable[Rule]) -> None:
        """See `Backend.require_rules`. Element types must also be those of the oldest target."""
        needed = list(rules)
        require_lowerings(self.target, needed)
        self._require_targets(f"action {rule.action}" for rule in needed)

    def _require_targets(self, needs: Iterable[str]) -> None:
        lowest = min(self.targets, key=TARGETS.index, default=TARGETS[-1])
        for need in dict.fromkeys(needs):
            since = SINCE.get(need.split()[-1], TARGETS[0])
            if TARGETS.index(lowest) < TARGETS.index(since):
                raise RecipeError(f"--target {lowest}: {need} needs {since} or later")

    def shared_timesteps(self, wanted: str) -> bool:
        """A timestep for each sample unless asked otherwise: it costs nothing here, and lets a batch mix steps."""
        return wanted == "shared"

    def legalise(self, *, shared: bool, result: CalibrationResult) -> tuple[GraphPass, ...]:
        """Factored form: a scale that is computed at run time builds, and runs in half precision."""
        limit = HALF / 2 if self.dtype == "fp16" else math.inf  # half: activations that calibration did not see
        return (
            WidenCodes(),
            QuantizeAttention(scales=result.attention),
            FactorScale(reach=result.reach, limit=limit),
            *self._casts(),
        )

    def _casts(self) -> tuple[GraphPass, ...]:
        return (CastFloats(dtype=SMALL[self.dtype]),) if self.dtype in SMALL else ()

    def greatest_batch(self, model: Path) -> int | None:
        """See `Backend.greatest_batch`: the least of the greatest shapes."""
        inputs = {str(value.name): shape_of(value) for value in ir.load(model).graph.inputs}
        return min(greatest[0] for _, _, greatest in profiles(inputs, self.shapes).values())

    def portable(self, model: Path, folder: Path) -> Path:
        """See `Backend.portable`. ONNX Runtime's CPU provider has no bfloat16."""
        if self.dtype != "bf16":
            return model
        graph = ir.load(model)
        run_passes(graph, [WidenFloats()])
        folder.mkdir(parents=True, exist_ok=True)
        ir.save(graph, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
        return folder / "model.onnx"

    def baseline(self, model: Path, read: Reader, folder: Path) -> Path:
        """See `Backend.baseline`. A copy of the graph in `dtype` with a plan of its own beside it."""
        graph = read(model)
        run_passes(graph, self._casts())
        folder.mkdir(parents=True, exist_ok=True)
        ir.save(graph, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
        self.build(folder / "model.onnx", folder / "engine")
        return folder / "model.onnx"

    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> str:
        """See `Backend.build`.

        Raises:
            NotHereError: TensorRT is missing here.
            BackendError: the graph, a shape or a target is refused.
        """
        folder.mkdir(parents=True, exist_ok=True)
        graph = ir.load(model)
        refused = [f"'{item.node}': {item.rule}; {item.fix}" for item in self._check(graph) if item.verdict == "rejected"]
        if refused:
            raise BackendError(f"{model} will not build for --format {self.name}:\n  " + "\n  ".join(refused))
        inputs = {str(value.name): shape_of(value) for value in graph.graph.inputs}
        wanted = profiles(inputs, self.shapes)
        if importlib.util.find_spec(MODULES[self.name]) is None:
            raise NotHereError(
                f"{MODULES[self.name]} is not installed here; {model.parent} is finished up to the graph. Copy the folder to the "
                f"GPU machine and run there:\n  {INSTALL[self.name]} && dq-export finish {model.parent}"
            )
        request = PlanRequest(
            module=MODULES[self.name],
            model=str(model.resolve()),
            plan=str((folder / PLAN).resolve()),
            targets=tuple(target.upper() for target in self.targets),
            profiles=wanted,
        )
        report = build_plan(request, progress)
        (folder / LAYERS).write_text(report.layers)
        described = {
            "library": f"{request.module} {report.version}",
            "targets": self.targets,
            "dtype": self.dtype,
            "profiles": wanted,
            "seconds": report.seconds,
            "peak_bytes": report.peak_bytes,
            "sha256": report.sha256,
        }
        (folder / METADATA).write_text(json.dumps(described, indent=1) + "\n")
        return ""

    def load(self, model: Path, *, batch: int | None = None) -> Engine:
        """See `Backend.load`. The plan in `engine/` beside the graph, on an NVIDIA GPU.

        Args:
            batch: not fixed; a plan has its profile.

        Raises:
            BackendError: no plan, one of another library or version, one cut short, or for other GPUs than this one.
        """
        folder = model.parent / "engine"
        if not (folder / PLAN).exists() or not (folder / METADATA).exists():
            raise BackendError(f"{folder}: no {PLAN}; run `dq-export finish {model.parent}`")
        described = _read_metadata(folder / METADATA)
        if importlib.util.find_spec(MODULES[self.name]) is None:
            raise BackendError(f"{MODULES[self.name]} is not installed; {INSTALL[self.name]}, needed to run {folder / PLAN}")
        library = f"{MODULES[self.name]} {importlib.import_module(MODULES[self.name]).__version__}"
        if described["library"] != library:
            raise BackendError(
                f"{folder / PLAN} was built by {described['library']}, here is {library}; run `dq-export finish {model.parent}`"
            )
        content = (folder / PLAN).read_bytes()
        if hashlib.sha256(content).hexdigest() != described["sha256"]:
            raise BackendError(f"{folder / PLAN} is not the plan that was built; run `dq-export finish {model.parent}`")
        return load_plan(content, tuple(described["targets"]), rtx=self.name == "trt-rtx")

    def profile(self, model: Path, feed: Feed) -> dict[str, float]:
        """See `Backend.profile`: not measured for plans."""
        return {}

    def audit(self, model: Path, folder: Path, assigned: Mapping[str, Rule]) -> Audit:
        """See `Backend.audit`. By the list of layers that the builder printed."""
        try:
            layers = read_layers(read_text(folder / LAYERS, LAYERS_LIMIT, links=False))
        except (DocumentError, ValueError) as error:
            raise BackendError(f"{folder / LAYERS}: not a builder's list of layers ({printable(str(error))})") from error

        def kernel(name: str) -> tuple[str, bool]:
            label, precision = kernel_of(layers, name)
            return label, bool(precision)

        rules = {item.node: item.rule for item in self._check(ir.load(model))}

        def why(node: ir.Node, kernel: str) -> str:
            return rules.get(str(node.name)) or f"the builder chose {kernel}; no known rule says why"

        return audit_graph(model, assigned, kernel, why)

    def _check(self, graph: ir.Model) -> list[Finding]:
        return check(graph, "trt" if self.name == "trt" else "trt-rtx", self.targets)


def _read_metadata(path: Path) -> dict[str, Any]:
    """`plan.json`, of which a run needs `library`, `sha256` and `targets`.

    Raises:
        BackendError: the file is not what `build` wrote.
    """
    try:
        described = read_json(path, links=False)
    except DocumentError as error:
        raise BackendError(f"{error}; build the plan again with `dq-export finish`") from error
    values = described if isinstance(described, dict) else {}
    targets = values.get("targets")
    known = isinstance(targets, list) and all(target in TARGETS for target in targets)
    if not known or not all(isinstance(values.get(key), str) for key in ("library", "sha256")):
        raise BackendError(f"{shown_path(path)}: not what a build writes; build the plan again with `dq-export finish`")
    return values
