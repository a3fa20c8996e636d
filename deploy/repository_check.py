"""What is wrong with a Triton model repository, as far as its files tell: also what the server accepts and ignores."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

NUMBERS = {
    "onnxruntime": ("intra_op_thread_count", "inter_op_thread_count", "execution_mode", "enable_mem_arena", "enable_mem_pattern",
                    "memory.enable_memory_arena_shrinkage", "session.use_device_allocator_for_initializers"),
    "tensorrt": ("execution_context_allocation_strategy",),
    "python": ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"),
}  # fmt: skip
"""The keys of `parameters` that each backend reads; it ignores all others without a word."""
TEXTS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS", "execution_context_allocation_strategy",
         "memory.enable_memory_arena_shrinkage")  # fmt: skip
"""Those whose values are no whole numbers."""
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
TEXTUAL = ("denoiser", "scheduler", "schedulers", "guidance_scale")
"""Parameters of our own pipelines that are no whole numbers."""
PLATFORMS = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt", "ensemble": "ensemble"}
ACCELERATORS = {"gpu_execution_accelerator": ("tensorrt", "cuda"), "cpu_execution_accelerator": ("openvino",)}
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
ONNX_TYPES = {
    1: "TYPE_FP32", 2: "TYPE_UINT8", 3: "TYPE_INT8", 4: "TYPE_UINT16", 5: "TYPE_INT16", 6: "TYPE_INT32", 7: "TYPE_INT64",
    8: "TYPE_STRING", 9: "TYPE_BOOL", 10: "TYPE_FP16", 11: "TYPE_FP64", 12: "TYPE_UINT32", 13: "TYPE_UINT64", 16: "TYPE_BF16",
}  # fmt: skip
"""By ONNX's number of an element type. Source: onnx.proto, TensorProto.DataType."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong.

    Args:
        model: its folder's name; empty for the repository.
        severity: `error`: the model does not load, or not as written; `warning`: it loads, and does not do what it seems to.
        what: the field or file, and what was found.
        fix: what to do.
    """

    model: str
    severity: Literal["error", "warning"]
    what: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model's folder.

    Args:
        config: Triton's ModelConfig message.
        names: the repository's models with their configs; None where one cannot be read, which is told already.
    """

    folder: Path
    config: Any
    names: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """As Triton finds it, from `backend` or the older `platform`."""
        return str(self.config.backend or PLATFORMS.get(self.config.platform, ""))

    @property
    def versions(self) -> list[Path]:
        """The folders that are named by a number."""
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit())

    @property
    def file(self) -> str:
        """What each version's folder must hold."""
        return str(self.config.default_model_filename or FILES.get(self.backend, ""))

    def fault(self, what: str, fix: str) -> Fault:
        """Something that does not load, or not as written."""
        return Fault(model=self.folder.name, severity="error", what=what, fix=fix)

    def warning(self, what: str, fix: str) -> Fault:
        """Something that loads and does not do what it seems to."""
        return Fault(model=self.folder.name, severity="warning", what=what, fix=fix)


def check_repository(folder: Path) -> list[Fault]:
    """Every fault of every model of a repository; nothing is loaded or run.

    Not known without the server: whether it has the backend, a GPU, the versions that a plan or an ONNX operator needs.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    faults = list(_stray(folder))
    configs: dict[str, Any] = {}
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not folders:
        return [Fault(model="", severity="error", what=f"{folder}: no model folders", fix="pass a model repository")]
    for path in folders:
        configs[path.name] = None
        file = path / "config.pbtxt"
        if not file.is_file():
            what = "no config.pbtxt: what the server makes up may have other inputs, two instances and a batch of 4"
            faults.append(Fault(model=path.name, severity="error", what=what, fix="write one"))
            continue
        try:
            configs[path.name] = text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        except (text_format.ParseError, UnicodeDecodeError) as error:
            faults.append(Fault(model=path.name, severity="error", what=f"config.pbtxt: {error!s}", fix="mend that line"))
    for name, config in configs.items():
        if config is None:
            continue
        model = Model(folder=folder / name, config=config, names=configs)
        faults += [fault for rule in RULES for fault in rule(model)]
    return faults


def _stray(folder: Path) -> Iterator[Fault]:
    """Files that leave the repository, or that run code when they are loaded."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name, inside = path.relative_to(folder).parts[0], path.relative_to(folder)
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            fix = "copy the file: a link is not there on another machine"
            yield Fault(model=name, severity="error", what=f"{inside} is a link out of the repository", fix=fix)
        if path.suffix in PICKLES:
            what = f"{inside}: a pickle can run code when it is loaded"
            yield Fault(model=name, severity="warning", what=what, fix="convert it to safetensors or .npy, or remove it")


def _identity(model: Model) -> Iterator[Fault]:
    config = model.config
    if config.name != model.folder.name:
        yield model.fault(f"name: '{config.name}' is not the folder's", f"write name: '{model.folder.name}'")
    if not model.backend:
        known = ", ".join(FILES)
        yield model.fault(f"backend: '{config.platform}' names none; the server guesses", f"write one of {known}")
    if not config.input or not config.output:
        yield model.fault("input or output is missing; the server makes them up", "list every input and output")


def _versions(model: Model) -> Iterator[Fault]:
    if model.backend == "ensemble":
        if not model.versions:
            yield model.fault("no version folder", "make an empty folder 1")
        return
    if not model.versions:
        yield model.fault("no version folder", "put the model into a folder 1")
    there = {int(path.name) for path in model.versions}
    for version in model.config.version_policy.specific.versions:
        if int(version) not in there:
            yield model.fault(f"version_policy: there is no version {version}", "name versions that are there")
    name = model.file
    if "/" in name or name in (".", ".."):
        yield model.fault(f"default_model_filename: '{name}' is a path", "a plain file name inside the version's folder")
        return
    for path in model.versions if name else ():
        file = path / name
        if not file.exists() or (file.is_file() and not file.stat().st_size):
            yield model.fault(f"{path.name}/{name} is missing or empty", "copy it there")
        elif model.backend == "python":
            yield from _program(model, file)


def _program(model: Model, file: Path) -> Iterator[Fault]:
    """Read model.py, never run it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        yield model.fault(f"{file.parent.name}/{file.name}: {error}", "mend it")
        return
    if not any(isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel" for node in tree.body):
        yield model.fault(f"{file.parent.name}/{file.name}: no class TritonPythonModel", "define it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InferenceRequest"):
            named = [k.value.value for k in node.keywords if k.arg == "model_name" and isinstance(k.value, ast.Constant)]
            for target in named:
                if isinstance(target, str) and target not in model.names:
                    yield model.fault(f"{file.name} calls model '{target}', which is not here", "add it, or correct the name")


def _instances(model: Model) -> Iterator[Fault]:
    groups = model.config.instance_group
    if model.backend == "ensemble":
        return
    if not groups or any(group.count < 1 for group in groups):
        yield model.warning("instance_group: no count; on a processor that is two instances, the weights twice", "write count: 1")
    kinds = {group.Kind.Name(group.kind) for group in groups}
    if model.backend == "tensorrt" and "KIND_CPU" in kinds:
        yield model.fault("instance_group: a plan cannot run on KIND_CPU", "write kind: KIND_GPU")
    accelerators = model.config.optimization.execution_accelerators
    for key, known in ACCELERATORS.items():
        for item in getattr(accelerators, key):
            if item.name not in known:
                yield model.fault(f"{key}: '{item.name}' is unknown", f"expected {', '.join(known)}")
            elif model.backend != "onnxruntime":
                yield model.warning(f"{key}: backend {model.backend} ignores it", "remove it")
            elif key.startswith("gpu") and kinds == {"KIND_CPU"}:
                yield model.warning(f"{key}: '{item.name}' is ignored on KIND_CPU", "write kind: KIND_GPU, or remove it")
            elif item.name == "openvino":
                yield model.warning(f"{key}: '{item.name}' loads only where the server was built with it", "try it there")


def _batching(model: Model) -> Iterator[Fault]:
    config = model.config
    for size in config.dynamic_batching.preferred_batch_size:
        if size > config.max_batch_size:
            yield model.fault(
                f"preferred_batch_size {size} is above max_batch_size {config.max_batch_size}", "choose one that is not"
            )
    if config.HasField("dynamic_batching") and not config.max_batch_size:
        yield model.fault("dynamic_batching without max_batch_size", "write max_batch_size: 8, or the greatest that fits")
    delay, callers = config.dynamic_batching.max_queue_delay_microseconds, _callers(model)
    if delay and callers:
        told = f"max_queue_delay_microseconds: {delay} are waited at every step of {', '.join(callers)}"
        yield model.warning(told, "write 0: requests of a loop batch without it")
    for item in (*config.input, *config.output):
        if item.HasField("reshape") and math.prod(item.dims) != math.prod(item.reshape.shape):
            told = f"reshape of '{item.name}': {list(item.dims)} and {list(item.reshape.shape)} differ in elements"
            yield model.fault(told, "correct one of them")
        if item.data_type == item.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name["TYPE_BF16"].number:
            yield model.warning(f"'{item.name}' is TYPE_BF16, which servers before 26.03 refuse", "TYPE_FP16 or TYPE_FP32")


def _callers(model: Model) -> list[str]:
    given = ((name, config.parameters["denoiser"].string_value) for name, config in model.names.items()
             if config is not None and "denoiser" in config.parameters)  # fmt: skip
    return [name for name, target in given if target == model.folder.name]


def _parameters(model: Model) -> Iterator[Fault]:
    known = NUMBERS.get(model.backend)
    for key, value in model.config.parameters.items():
        text = value.string_value
        if key == "EXECUTION_ENV_PATH" and "$$TRITON_MODEL_DIRECTORY" not in text:
            yield model.warning(f"parameters: {key} '{text}' is of this machine", "$$TRITON_MODEL_DIRECTORY/…")
        if model.backend == "python" and model.config.parameters.get("denoiser"):
            continue  # our own pipeline reads its own: see `_sampling`
        if known is not None and model.backend != "python" and key not in known:
            yield model.warning(f"parameters: backend {model.backend} ignores '{key}'", f"expected {', '.join(known)}")
        elif known is not None and key in known and key not in TEXTS and not re.fullmatch(r"-?\d+", text):
            yield model.fault(f"parameters: {key} '{text}' is no whole number", "write one, as a string")


def _warm_up(model: Model) -> Iterator[Fault]:
    inputs = {item.name: item for item in model.config.input}
    needed = {name for name, item in inputs.items() if not item.optional}
    for warm_up in model.config.model_warmup:
        given = warm_up.inputs
        for name in sorted(needed - given.keys()):
            yield model.fault(f"model_warmup '{warm_up.name}': input '{name}' is missing", "add it")
        for name in sorted(given.keys() - inputs.keys()):
            yield model.fault(f"model_warmup '{warm_up.name}': there is no input '{name}'", "remove it")
        for name in sorted(given.keys() & inputs.keys()):
            item, dims = given[name], list(inputs[name].dims)
            if item.data_type != inputs[name].data_type:
                yield model.fault(f"model_warmup '{warm_up.name}': '{name}' has another data_type", "that of the input")
            if len(item.dims) != len(dims) or any(a not in (b, -1) for a, b in zip(dims, item.dims, strict=True)):
                told = f"model_warmup '{warm_up.name}': '{name}' has dims {list(item.dims)}, the input {dims}"
                yield model.fault(told, "dims of one sample, without the batch")
        if warm_up.batch_size > model.config.max_batch_size:
            yield model.fault(f"model_warmup '{warm_up.name}': batch_size above max_batch_size", "a smaller one")


def _onnx(model: Model) -> Iterator[Fault]:
    """Names, types and shapes of the graph, and its external data."""
    if model.backend != "onnxruntime":
        return
    import onnx
    from google.protobuf.message import DecodeError

    for version in model.versions:
        path = version / model.file
        path = path / model.file if path.is_dir() else path
        if not path.is_file():
            continue
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
        except DecodeError as error:
            yield model.fault(f"{version.name}/{model.file} is not ONNX ({error})", "copy it again")
            continue
        stored = {item.name for item in graph.initializer}
        for kind, values in (("input", [v for v in graph.input if v.name not in stored]), ("output", list(graph.output))):
            yield from _signature(model, kind, {value.name: value.type.tensor_type for value in values})
        yield from _external(model, path.parent, graph.initializer)


def _signature(model: Model, kind: str, values: Mapping[str, Any]) -> Iterator[Fault]:
    entries = list(getattr(model.config, kind))
    named = [item.name for item in entries]
    for name in sorted({name for name in named if named.count(name) > 1}):
        yield model.fault(f"{kind} '{name}' is listed twice", "remove one")
    if kind == "input":
        for name in sorted(values.keys() - set(named)):
            yield model.fault(f"the graph's {kind} '{name}' is not listed", "add it")
    for item in entries:
        if item.name not in values:
            yield model.fault(f"{kind} '{item.name}' is not in the graph", f"expected {', '.join(values)}")
            continue
        value = values[item.name]
        wanted = ONNX_TYPES.get(value.elem_type, "none that Triton has")
        found = item.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[item.data_type].name
        if found != wanted:
            yield model.fault(f"{kind} '{item.name}' is {found}, in the graph {wanted}", f"write {wanted}")
        yield from _shape(model, kind, item, [dim.dim_value or -1 for dim in value.shape.dim])


def _shape(model: Model, kind: str, item: Any, shape: list[int]) -> Iterator[Fault]:
    dims = list(item.reshape.shape) if item.HasField("reshape") else list(item.dims)
    if model.config.max_batch_size:
        if not shape or shape[0] != -1:
            told = f"{kind} '{item.name}': the graph's first dimension is {shape[0] if shape else 'missing'}, not a free batch"
            yield model.fault(told, "export with a dynamic batch, or write max_batch_size: 0")
            return
        shape = shape[1:]
    if len(dims) != len(shape) or any(a != b and -1 not in (a, b) for a, b in zip(dims, shape, strict=True)):
        fix = "write the graph's dims without the batch; for one number a sample dims: [ 1 ] reshape { shape: [ ] }"
        yield model.fault(f"{kind} '{item.name}' has dims {dims}, in the graph {shape}", fix)


def _external(model: Model, folder: Path, initializers: Any) -> Iterator[Fault]:
    needed: dict[str, int] = {}
    for item in initializers:
        entry = {pair.key: pair.value for pair in item.external_data}
        if "location" in entry:
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
            needed[entry["location"]] = max(end, needed.get(entry["location"], 0))
    for location, end in needed.items():
        path = folder / location
        if not path.resolve().is_relative_to(folder.resolve()):
            yield model.fault(f"external data '{location}' lies outside of the model's folder", "save the model anew")
        elif not path.is_file():
            yield model.fault(f"external data '{location}' is missing", "copy it beside the graph")
        elif path.stat().st_size < end:
            yield model.fault(f"external data '{location}' is cut short: {path.stat().st_size} of {end} bytes", "copy it again")


def _ensemble(model: Model) -> Iterator[Fault]:
    for step in model.config.ensemble_scheduling.step:
        target = model.names.get(step.model_name)
        if step.model_name not in model.names:
            yield model.fault(f"ensemble_scheduling: model '{step.model_name}' is not here", "add it, or correct the name")
        if target is None:
            continue
        for mapped, kind in ((step.input_map, "input"), (step.output_map, "output")):
            for name in sorted(mapped.keys() - {item.name for item in getattr(target, kind)}):
                yield model.fault(f"ensemble_scheduling: '{step.model_name}' has no {kind} '{name}'", "correct the name")


def _sampling(model: Model) -> Iterator[Fault]:
    """Our own pipelines: parameters, limits that suit the denoiser, and the tables."""
    from .serving.model import PARAMETERS
    from .serving.schedules import FILE, ScheduleError, Schedules

    given = {key: value.string_value for key, value in model.config.parameters.items()}
    if model.backend != "python" or "denoiser" not in given:
        return
    for key in PARAMETERS:
        if key not in given:
            yield model.fault(f"parameters: '{key}' is missing", "write it as the export did")
        elif key not in TEXTUAL and not re.fullmatch(r"[1-9]\d*", given[key]):
            yield model.fault(f"parameters: {key} '{given[key]}' is no whole number above 0", "write one, as a string")
    for key in sorted(given.keys() - set(PARAMETERS)):
        yield model.warning(f"parameters: '{key}' is not read", f"expected {', '.join(PARAMETERS)}")
    target = model.names.get(given["denoiser"])
    if given["denoiser"] not in model.names:
        yield model.fault(f"parameters: denoiser '{given['denoiser']}' is not here", "add it, or correct the name")
    rows = int(given["max_rows"]) if given.get("max_rows", "").isdigit() else 0
    if target is not None and rows < target.max_batch_size:
        told = f"parameters: max_rows {rows} is below the denoiser's max_batch_size {target.max_batch_size}"
        yield model.warning(told, "make them equal: others' failing requests could fail pictures, too")
    if target is not None and rows > target.max_batch_size:
        told = f"parameters: max_rows {rows} is above the denoiser's max_batch_size {target.max_batch_size}"
        yield model.fault(told, "lower it")
    images = int(given["max_images"]) if given.get("max_images", "").isdigit() else 0
    if 2 * images > rows:
        yield model.fault(f"parameters: max_images {images} guided pictures are more than max_rows {rows}", "half of max_rows")
    for version in model.versions:
        try:
            schedules = Schedules.load(version / FILE, given.get("schedulers", "").split(","))
            schedules.steps(given.get("scheduler", ""), int(given.get("num_inference_steps", "0")))
        except OSError as error:
            yield model.fault(f"{version.name}/{FILE}: {error.strerror or error}", "copy it there")
        except ScheduleError as error:
            yield model.fault(f"parameters: {error}", "choose one that the tables have")
        except ValueError as error:
            yield model.fault(f"{version.name}/{FILE}: not readable without pickles ({error})", "export again")


Rule = Callable[[Model], Iterator[Fault]]
RULES: tuple[Rule, ...] = (
    _identity, _versions, _instances, _batching, _parameters, _warm_up, _onnx, _ensemble, _sampling,
)  # fmt: skip
