"""The whole export: one stage after the other, each finished whole, recorded, and never done twice."""

from __future__ import annotations

import gc
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from dq_export.calibration.collect.sampling import Sampling
from dq_export.calibration.group import ALONE, ProcessGroup
from dq_export.calibration.hessians import SPACE
from dq_export.calibration.plugin import UNCHANGED, WeightPlugin
from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.progress import Progress, Silent
from dq_export.core.recipe import Recipe, RecipeError, Rule
from dq_export.core.scales import ScaleTable, TimestepBins
from dq_export.deploy.backend import Backend, NotHereError

from .families.reference import Reference
from .finished_folder import MODEL, engine_of, portable_name
from .heap import return_freed_memory
from .ledger import Ledger, claim, require_usable
from .memory import plan_memory
from .output_folder import GATHERED, write_bytes
from .report.page import read_picture, write_report
from .report.report import FRONT, AuditReport, LinearReport, Report, SizeReport, StageResult, TableReport
from .report.verdict import concluded
from .stages.recording import PICTURES

STAGES = ("float", "calibrate", "reference", "quantize", "build", "audit", "verify", "triton", "bench")
MODULES = {
    "float": ("torch", "diffusers", "onnx", "onnxscript", "jinja2"),
    "reference": ("polygraphy", "safetensors"),
    "verify": ("onnxruntime", "polygraphy", "PIL"),
}
"""What a stage imports, beside its backend's."""
NOTHING, WORK = np.zeros(1), np.ones(1)
"""What the first process tells the others: whether there is a calibration to share."""
SPEED = 6.5e8
"""Bytes of float32 weights a second, of the export to ONNX and of the build of an engine; measured on two cores."""
VERSIONED = ("dq-export", "torch", "diffusers", "numpy", "onnx-ir", "onnxruntime")


def run(
    recipe: Recipe,
    folder: Path,
    *,
    exclude: tuple[str, ...] = (),
    until: str = STAGES[-1],
    overwrite: bool = False,
    progress: Progress | None = None,
    group: ProcessGroup = ALONE,
    max_memory: float | None = None,
    device: str = "cpu",
    front: Path | None = None,
    plugin: WeightPlugin = UNCHANGED,
) -> Report | None:
    """Export a model into `folder`; stages that are done already, with the same inputs, are kept.

    Args:
        exclude: regular expressions of module names that stay float, before all of the recipe's rules.
        until: the last stage to run, one of STAGES.
        overwrite: accept a folder that holds a run of another recipe.
        group: the processes that share the calibration. The first does all else and gets the report, the others None.
        device: where PyTorch samples: `cpu`, `cuda` or `cuda:N`. Tables differ by float32 rounding.
        plugin: the user's own weights and Hessians; not together with torchrun.
        front: the picture of the search that found the recipe, for the report.
        max_memory: GiB that each process may take; bench is left out where it alone does not fit.

    Raises:
        ModelError, RecipeError, CalibrationError, GraphError, BackendError, OutputError: see each. An engine that runs in float
            or is too far from PyTorch is no exception: the report's verdict says so.
    """
    from dq_export.deploy.backends import backend_of
    from dq_export.deploy.triton.repository import require_triton

    from .families.decoder import load_vae
    from .families.source import load, pin, require_device
    from .stages.repository import require_served

    watch = progress or Silent()
    picture = read_picture(front) if front else None
    if group.rank == 0:  # the others write only what the first one, which holds the lock, lets them
        require_usable(folder)
    watch.begin("load", recipe.model)
    start = time.monotonic()
    recipe, source = pin(recipe)
    memory = plan_memory(source.checkpoint.weights, recipe, max_memory, STAGES[: STAGES.index(until) + 1])
    stages = memory.stages
    require_device(device)
    backend = backend_of(recipe)
    _require_packages(stages, recipe)
    if backend and "build" in stages:
        backend.require()
    if recipe.triton:
        require_triton()
    reference = load(source, watch.advance)
    if recipe.triton and reference.decoder:
        load_vae(reference.decoder, reference.feed_shape, recipe.variant or "")  # for its errors, before all work
    resolved = resolve(recipe, exclude, reference, backend)
    assigned = resolved.assign(reference.linears)
    if backend:
        backend.require_schemes(rule.scheme for rule in assigned.values())
    _require_shapes(resolved, reference)
    reference.timesteps(resolved.steps)  # this and the next for their errors, before all work
    if resolved.triton and "triton" in stages:
        require_served(reference)
    watch.end(time.monotonic() - start, f"{len(reference.linears)} linears, {reference.sampler}", kept=False)
    if group.rank > 0:
        with reference.on(device):
            assist(reference, resolved, assigned, folder, group, memory.space)
        return None
    with claim(folder, resolved.dump(), overwrite=overwrite) as ledger:
        export = Export(
            recipe=resolved,
            reference=reference,
            backend=backend,
            assigned=assigned,
            folder=folder,
            ledger=ledger,
            progress=watch,
            group=group,
            device=device,
            plugin=plugin,
            space=memory.space,
        )
        export.run_stages(stages[-1])
        if stages[-1] != until:
            watch.begin(until, f"left out: it does not fit in {max_memory:g} GiB")
        report = export.report()
        if picture is not None:
            write_bytes(folder / FRONT, picture)
        write_report(report, folder)
    return report


def _require_packages(stages: tuple[str, ...], recipe: Recipe) -> None:
    """Ask for all that the stages import, so that none of them fails for it after hours.

    Raises:
        BackendError: see `require_packages`.
    """
    from dq_export.deploy.packages import require_packages

    for stage in stages:
        modules = MODULES.get(stage, ())
        if stage == "quantize" and recipe.format == "ort":  # its version decides what the graph may hold
            modules = (*modules, "onnxruntime")
        require_packages(modules, f"the stage {stage} of --format {recipe.format}")


def resolve(recipe: Recipe, exclude: tuple[str, ...], reference: Reference, backend: Backend | None) -> Recipe:
    """The recipe with every value filled in that depends on the model or the backend.

    Raises:
        RecipeError: a pattern of `exclude` is no regular expression.
    """
    try:
        front = tuple(Rule(match=pattern, action="float", reason="excluded by --exclude") for pattern in exclude)
    except ValidationError as error:
        reasons = [item["msg"].removeprefix("Value error, ") for item in error.errors()]
        raise RecipeError(f"--exclude: {'; '.join(reasons)}") from error
    shared = backend.shared_timesteps(recipe.timesteps) if backend else recipe.timesteps != "per-sample"
    if recipe.triton:
        _require_servable(recipe, backend)
        shared = False
    return recipe.model_copy(
        update={
            "rules": (*front, *(reference.rules if recipe.rules is None else recipe.rules)),
            "provider": backend.provider if backend else None,
            "dtype": backend.dtype if backend else "fp32",
            "guidance_scale": reference.guidance if recipe.guidance_scale is None else recipe.guidance_scale,
            "timesteps": "shared" if shared else "per-sample",
        }
    )


def _require_shapes(recipe: Recipe, reference: Reference) -> None:
    """Read the shapes before the work, of the inputs that the graph will have: a plan needs them, others may name them.

    Raises:
        BackendError: see `profiles`.
    """
    from dq_export.deploy.tensorrt.profiles import profiles

    shared = recipe.timesteps == "shared"
    inputs = {item.name: tuple(size if isinstance(size, int) else None for size in item.shape) for item in reference.inputs}
    if shared:
        inputs["timestep"] = (1,)
    named = (recipe.min_shapes, recipe.opt_shapes, recipe.max_shapes)
    if recipe.format in ("trt", "trt-rtx") or any(named):
        profiles(inputs, named)


def _require_servable(recipe: Recipe, backend: Backend | None) -> None:
    if backend is None or not backend.triton:
        flags = f"--format {recipe.format}" + (f" --provider {recipe.provider}" if recipe.provider else "")
        raise RecipeError(f"--triton: no backend of Triton's serves {flags}; --format ort and --format trt are served")
    if recipe.timesteps == "shared":
        raise RecipeError(
            "--triton needs --timesteps per-sample: requests at different steps share one call of the denoiser; export into "
            "another folder without --timesteps shared"
        )


def assist(
    reference: Reference, recipe: Recipe, assigned: Mapping[str, Rule], folder: Path, group: ProcessGroup, space: int
) -> None:
    """Sample this process's share of the calibration, if the first process finds that it is to be done."""
    from dq_export.calibration.calibrate import calibrate
    from dq_export.calibration.context import Calibration

    if group.largest(NOTHING).any():
        calibrate(
            Calibration(
                denoiser=reference,
                recipe=recipe,
                assigned=assigned,
                sampling=sampling_of(recipe, reference),
                folder=folder / GATHERED,
                group=group,
                space=space,
            )
        )


def sampling_of(recipe: Recipe, reference: Reference) -> Sampling:
    """Which pictures a recipe's calibration samples."""
    return Sampling(
        calib_size=recipe.calib_size,
        steps=recipe.steps,
        seed=recipe.seed,
        guidance=recipe.guidance_scale or 1.0,
        conditions=len(reference.conditions),
        batch=reference.batch,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Export:
    """One export: what it works on, and its stages."""

    recipe: Recipe
    reference: Reference
    backend: Backend | None
    assigned: Mapping[str, Rule]
    folder: Path
    ledger: Ledger
    progress: Progress
    group: ProcessGroup = ALONE
    device: str = "cpu"
    plugin: WeightPlugin = UNCHANGED
    space: int = SPACE
    results: dict[str, StageResult] = field(default_factory=dict)
    unbuilt: list[NotHereError] = field(default_factory=list)

    def run_stages(self, until: str) -> None:
        """Every stage in order, up to and including `until`. The weights are freed as soon as no stage needs them."""
        r, digest = self.recipe, self.ledger.digest
        duration = about(sum(self.reference.weight(name).nbytes for name in self.reference.linears))
        self._stage(
            "float", f"PyTorch to ONNX{duration}", ("float",), self._export_float, lambda: [self.reference.digest, r.timesteps]
        )
        self._stage(
            "calibrate", self._calls_text(), ("calibration.safetensors",), self._calibrate, self._calibration_inputs, until
        )
        if until not in ("quantize", "build"):  # which compare nothing
            self._stage(
                "reference", f"PyTorch draws {r.parity_size} pictures to compare with",
                tuple(f"parity/{name}" for name in ("inputs.json", "outputs.json", PICTURES)), self._record,
                lambda: [self.reference.digest, list(self._bins().edges), *self._drawn()], until,
            )  # fmt: skip
        self.reference.release()
        self._stage(
            "quantize", "passes on the graph", ("model.onnx", "model.onnx.data"), self._quantize,
            lambda: [digest("float"), digest("calibrate"), r.format, r.provider, self._small_dtype(), self._schemes()],
            until,
        )  # fmt: skip
        if self.backend:
            built = f"engine for {' '.join(filter(None, (r.format, r.provider, r.dtype)))}{duration}"
            options = [r.dtype, r.target, r.min_shapes, r.opt_shapes, r.max_shapes]
            try:
                tools = self.backend.packages
                inputs = [*options, versions(tools)]
                self._stage("build", built, ("engine",), self._build, lambda: [digest("quantize"), *inputs], until)
                self._stage("audit", "kernels of the engine", (), self._audit, lambda: [digest("build")], until)
            except NotHereError as error:
                self.unbuilt.append(error)
        self._stage(
            "verify", "PyTorch, float ONNX, Q/DQ ONNX, engine", self._compared(), self._verify,
            lambda: [digest("quantize"), digest("reference")], until,
        )  # fmt: skip
        if r.triton:
            self._stage("triton", "model repository", ("triton",), self._write_repository, self._repository_inputs, until)
        if self.backend and self.backend.runs:
            self._stage(
                "bench", "engine and float graph in turn", (), self._bench, lambda: [digest("build"), digest("float")], until
            )

    def report(self) -> Report:
        """What is known so far."""
        calibration = self._load_calibration() if "calibrate" in self.results else None
        done = self.results
        nothing = StageResult()
        report = Report(
            model=self.recipe.model,
            digest=self.reference.digest,
            sampler=self.reference.sampler,
            guidance_scale=self.recipe.guidance_scale or 1.0,
            timesteps=self.recipe.timesteps,
            machine=f"{platform.machine()}, {platform.system()}, {cpu_name()}",
            versions={**versions(), **versions(self.backend.packages if self.backend else ())},
            engine=self.backend.title if self.backend else "",
            seconds={name: result.seconds for name, result in done.items()},
            measured_at=list(calibration.timesteps) if calibration else [],
            tables=[table_report(plan) for plan in calibration.sites.values()] if calibration else [],
            linears=[self._linear_report(name, calibration) for name in self.reference.linears],
            passes=done.get("quantize", nothing).passes,
            size=done.get("quantize", nothing).size,
            audit=done.get("audit", nothing).audit,
            parity=done.get("verify", nothing).parity,
            latency=done.get("bench", nothing).latency,
        )
        return concluded(report, self.recipe, str(self.unbuilt[0]) if self.unbuilt else "")

    def _stage(
        self,
        name: str,
        what: str,
        outputs: tuple[str, ...],
        work: Callable[[Path], StageResult],
        inputs: Callable[[], list[Any]],
        until: str = STAGES[-1],
    ) -> None:
        if STAGES.index(name) > STAGES.index(until):
            return
        self.progress.begin(name, what)
        start = time.monotonic()

        return_freed_memory()

        def timed(partial: Path) -> StageResult:
            return work(partial).model_copy(update={"seconds": round(time.monotonic() - start, 2)})

        result, now = self.ledger.stage(name, {"inputs": inputs(), "versions": versions()}, outputs, timed)
        if name == "calibrate" and not now:
            self.group.largest(NOTHING)
        self.results[name] = result
        self.progress.end(time.monotonic() - start, result.summary, kept=not now)

    def _export_float(self, partial: Path) -> StageResult:
        (partial / "float").mkdir()
        path = partial / "float" / "model.onnx"
        self.reference.export_onnx(path, shared=self.recipe.timesteps == "shared")
        return StageResult(summary=f"{_bytes(path.parent) / 1e6:.1f} MB")

    def _calls_text(self) -> str:
        from dq_export.calibration.calibrate import samples

        r = self.recipe
        if not samples(r, self.assigned):
            return "of weights alone: nothing is sampled"
        return f"{r.calib_size} pictures of {r.steps} steps, method {r.method}, scaling {r.scaling}"

    def _calibration_inputs(self) -> list[Any]:
        ignored = {"format", "provider", "dtype", "target", "min_shapes", "opt_shapes", "max_shapes", "model", "rules"}
        ignored |= {"revision", "variant"}  # the reference's digest is of what they choose
        ignored |= {"bits", "granularity", "group_size", "min_coverage", "min_sqnr", "parity_size", "timesteps", "triton"}
        dumped = self.recipe.model_dump(mode="json", exclude=ignored)
        return [self.reference.digest, self._schemes(), dumped, *filter(None, [self.plugin.name])]

    def _schemes(self) -> dict[str, str]:
        return {name: str(rule.scheme) for name, rule in self.assigned.items()}

    def _calibrate(self, partial: Path) -> StageResult:
        from dq_export.calibration.calibrate import calibrate
        from dq_export.calibration.context import Calibration

        r = self.recipe
        provenance = {"model": self.reference.digest, "sampler": self.reference.sampler, **versions()}
        provenance |= {key: str(getattr(r, key)) for key in ("seed", "steps", "calib_size", "guidance_scale")}
        calibration = Calibration(
            denoiser=self.reference,
            recipe=r,
            assigned=self.assigned,
            sampling=sampling_of(r, self.reference),
            folder=self.folder / GATHERED,
            provenance=provenance,
            progress=self.progress.advance,
            group=self.group,
            plugin=self.plugin,
            space=self.space,
        )
        self.group.largest(WORK)
        with self.reference.on(self.device):
            result = calibrate(calibration)
        assert result is not None  # the first process gets it
        result.save(partial / "calibration.safetensors")
        shutil.rmtree(calibration.folder, ignore_errors=True)  # there is none where only weights are quantized
        scaled = sum(plan.scaled for plan in result.sites.values())
        return StageResult(summary=f"{len(result.sites)} inputs, {scaled} scaled, {len(result.bins())} timestep bins")

    def _small_dtype(self) -> str | None:
        """The dtype, for formats whose graph holds it; OpenVINO is told it when it compiles."""
        return self.recipe.dtype if self.recipe.format in ("trt", "trt-rtx") else None

    def _load_calibration(self) -> CalibrationResult:
        return CalibrationResult.load(self.folder / "calibration.safetensors")

    def _quantize(self, partial: Path) -> StageResult:
        from .stages.quantized_graph import quantize_graph

        source, target = self.folder / "float" / "model.onnx", partial / "model.onnx"
        result, shared = self._load_calibration(), self.recipe.timesteps == "shared"
        legalise = self.backend.legalise(shared=shared, result=result) if self.backend else ()
        reports = quantize_graph(source, target, result, self.assigned, legalise, self.progress.advance)
        gc.collect()  # the graph ties its mapped weights into cycles
        size = SizeReport(float_bytes=_bytes(source.parent), engine_bytes=_bytes(partial))
        return StageResult(
            summary=f"{size.float_bytes / 1e6:.1f} -> {size.engine_bytes / 1e6:.1f} MB",
            passes=reports,
            size=size,
        )

    def _build(self, partial: Path) -> StageResult:
        assert self.backend is not None
        built = self.backend.build(self.folder / "model.onnx", partial / "engine", self.progress.advance)
        return StageResult(summary=built.note)

    def _audit(self, partial: Path) -> StageResult:
        assert self.backend is not None
        audit = AuditReport.of(self.backend.audit(engine_of(self.folder), self.assigned))
        return StageResult(summary=f"{audit.coverage:.1%} of the quantized FLOPs in low precision", audit=audit)

    def _bins(self) -> TimestepBins:
        return self._load_calibration().bins()

    def _drawn(self) -> list[Any]:
        r = self.recipe
        return [r.parity_size, r.steps, r.seed, r.guidance_scale, r.timesteps]

    def _record(self, partial: Path) -> StageResult:
        from .stages.recording import record

        with self.reference.on(self.device):
            record(self.reference, self.recipe, self._bins(), partial / "parity", self.progress.advance)
        return StageResult()

    def _compared(self) -> tuple[str, ...]:
        pictures = ("parity/pictures.png",) if self.reference.feed_shape[0] in (1, 3) else ()
        portable = portable_name(self.recipe)
        return (*pictures, *((portable, f"{portable}.data") if portable != MODEL else ()))

    def _verify(self, partial: Path) -> StageResult:
        from .stages.comparison import verify

        return verify(
            self.reference, self.recipe, self._bins(), self.folder, partial / "parity", self.progress.advance, self.backend
        )

    def _repository_inputs(self) -> list[Any]:
        from .stages.repository import inputs

        stages = [name for name in ("quantize", "build") if name in self.results]
        return [*map(self.ledger.digest, stages), *inputs(self.reference, self.recipe)]

    def _write_repository(self, partial: Path) -> StageResult:
        from .stages.repository import write

        assert self.backend is not None
        return write(self.reference, self.recipe, self.backend, self.folder, partial / "triton", self.progress.advance)

    def _bench(self, partial: Path) -> StageResult:
        from .stages.speed import bench

        assert self.backend is not None
        latency = bench(self.folder, self.backend, self.progress.advance)
        return StageResult(summary=f"{latency.ratio:.2f}x the speed of {latency.baseline}", latency=latency)

    def _linear_report(self, name: str, calibration: CalibrationResult | None) -> LinearReport:
        rule = self.assigned[name]
        plans = calibration.sites.values() if calibration and rule.scheme.low_precision else ()
        plan = next((plan for plan in plans if name in plan.site.linears), None)
        return LinearReport(
            name=name,
            action=rule.action,
            rule=rule.match,
            reason=rule.reason,
            site=plan.site.name if plan else "",
            scaling=plan.method if plan else "",
            fold=plan.site.target if plan and plan.scaled else "",
            bins=len(plan.activation.bins) if plan and plan.activation else 0,
            error=plan.error if plan and np.isfinite(plan.error) else None,
            sqnr=_finite(calibration.sqnr.get(name)) if calibration else [],
        )


def about(size: int) -> str:
    """How long a call into a library will take that tells nothing meanwhile, from the bytes of the weights; from 2 s on."""
    return f", about {size / SPEED:.0f} s" if size > 2 * SPEED else ""


def table_report(plan: SitePlan) -> TableReport:
    """A site's scales as the report shows them."""
    scale = plan.activation
    if isinstance(scale, ScaleTable):
        edges, scales = list(scale.bins.edges), [float(value) for value in scale.scale]
        return TableReport(
            site=plan.site.name, granularity="tensor", edges=edges, scales=scales, alternatives=dict(plan.alternatives)
        )
    found = "float" if scale is None else "token-group" if scale.group else "token"
    return TableReport(site=plan.site.name, granularity=found, edges=[], scales=[], alternatives=dict(plan.alternatives))


def _finite(values: npt.NDArray[np.float32] | None) -> list[float | None]:
    return [] if values is None else [round(float(value), 1) if np.isfinite(value) else None for value in values]


def versions(names: tuple[str, ...] = VERSIONED) -> dict[str, str]:
    """Versions of the distributions of these names that are installed; by default of those that decide every export's bytes."""
    installed = {}
    for name in names:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if names is VERSIONED:
                installed[name] = "not installed"
    return installed


def cpu_name() -> str:
    """The processor's model name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
