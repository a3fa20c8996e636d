"""Rules for a config.pbtxt: entries that do not load, and entries that the server ignores."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from dq_export.core.documents import shown

from .model_folder import FILES, Fault, Model, has_type, type_of

NUMBERS = {
    "onnxruntime": ("intra_op_thread_count", "inter_op_thread_count", "execution_mode", "enable_mem_arena", "enable_mem_pattern",
                    "memory.enable_memory_arena_shrinkage", "session.use_device_allocator_for_initializers"),
    "tensorrt": ("execution_context_allocation_strategy",),
}  # fmt: skip
"""The keys of `parameters` that these backends read; they silently ignore all others. A python model defines its own keys."""
TEXTS = ("execution_context_allocation_strategy", "memory.enable_memory_arena_shrinkage")
"""Keys whose values are not whole numbers."""
ACCELERATORS = {"gpu_execution_accelerator": ("tensorrt", "cuda"), "cpu_execution_accelerator": ("openvino",)}


def identity(model: Model) -> Iterator[Fault]:
    """Check that name, backend, inputs and outputs are present."""
    config = model.config
    if config.name != model.folder.name:
        yield model.fault(f"name: '{config.name}' is not the folder's", f"write name: '{model.folder.name}'")
    if not model.backend:
        backends = ", ".join(FILES)
        yield model.fault(f"backend: '{config.platform}' names none; the server guesses", f"write one of {backends}")
    if not config.input or not config.output:
        yield model.fault("input or output is missing; the server makes them up", "list every input and output")


def instances(model: Model) -> Iterator[Fault]:
    """Check the number of instances, their devices and their accelerators."""
    groups = model.config.instance_group
    if model.backend == "ensemble":
        return
    if not groups or any(group.count < 1 for group in groups):
        yield model.warning("instance_group: no count; on a processor that is two instances, the weights twice", "write count: 1")
    kind_numbers = groups[0].Kind.items() if groups else []
    kinds = {name for name, number in kind_numbers if any(group.kind == number for group in groups)}
    if any(group.kind not in dict(kind_numbers).values() for group in groups):
        yield model.fault("instance_group: kind is not the number of a kind", "write KIND_CPU, KIND_GPU or no kind")
    if model.backend == "tensorrt" and "KIND_CPU" in kinds:
        yield model.fault("instance_group: a plan cannot run on KIND_CPU", "write kind: KIND_GPU")
    accelerators = model.config.optimization.execution_accelerators
    for key, names in ACCELERATORS.items():
        for item in getattr(accelerators, key):
            if item.name not in names:
                yield model.fault(f"{key}: '{item.name}' is unknown", f"expected {', '.join(names)}")
            elif model.backend != "onnxruntime":
                yield model.warning(f"{key}: backend {model.backend} ignores it", "remove it")
            elif key.startswith("gpu") and kinds == {"KIND_CPU"}:
                yield model.warning(f"{key}: '{item.name}' is ignored on KIND_CPU", "write kind: KIND_GPU, or remove it")
            elif item.name == "openvino":
                yield model.warning(f"{key}: '{item.name}' loads only where the server was built with it", "try it there")


def batching(model: Model) -> Iterator[Fault]:
    """Check batch sizes, queue delays, types, dims and reshapes."""
    config = model.config
    if config.max_batch_size < 0:
        yield model.fault(f"max_batch_size: {config.max_batch_size} is below 0", "write 0, or the greatest batch that fits")
    for size in config.dynamic_batching.preferred_batch_size:
        if size > config.max_batch_size:
            yield model.fault(
                f"preferred_batch_size {size} is above max_batch_size {config.max_batch_size}", "choose one that is not"
            )
    if config.HasField("dynamic_batching") and not config.max_batch_size:
        yield model.fault("dynamic_batching without max_batch_size", "write max_batch_size: 8, or the greatest that fits")
    delay, callers = config.dynamic_batching.max_queue_delay_microseconds, _callers(model)
    if delay and callers:
        problem = f"max_queue_delay_microseconds: every step of {', '.join(callers)} waits {delay}"
        yield model.warning(problem, "write 0: requests of a loop batch without it")
    for item in (*config.input, *config.output):
        if not has_type(item):
            yield model.fault(f"'{item.name}': data_type is {type_of(item)}", "write TYPE_FP32, or another of Triton's types")
        if any(size < -1 or size == 0 for size in item.dims):
            yield model.fault(f"'{item.name}': dims {shown(list(item.dims))}", "write sizes of 1 and more, or -1 for any")
        if item.HasField("reshape") and math.prod(item.dims) != math.prod(item.reshape.shape):
            dims, shape = shown(list(item.dims)), shown(list(item.reshape.shape))
            yield model.fault(f"reshape of '{item.name}': {dims} and {shape} differ in elements", "correct one of them")
        if type_of(item) == "TYPE_BF16":
            yield model.warning(f"'{item.name}' is TYPE_BF16, which servers before 26.03 refuse", "TYPE_FP16 or TYPE_FP32")


def bounds(model: Model) -> Iterator[Fault]:
    """Check that each input has a maximum size, so that the server refuses larger requests before it allocates memory."""
    open_batch = model.backend != "python" and not model.config.max_batch_size
    if open_batch and any(item.dims and item.dims[0] == -1 for item in model.config.input):
        yield model.warning("max_batch_size is 0: a request may have any number of rows", "open its port to trusted clients")
    for item in model.config.input:
        if -1 in list(item.dims)[open_batch:]:
            problem = f"input '{item.name}' has dims {shown(list(item.dims))}: a request may ask for any size"
            fix = "write the greatest as fixed dims, and max_batch_size for how many"
            if model.backend == "python":  # sizes that overflow pass the server's check and stop the program
                yield model.fault(f"{problem}, and one of a few bytes can end the program for all", fix)
            else:
                yield model.warning(problem, fix)


def _callers(model: Model) -> list[str]:
    """The names of the pipelines that call a model as their denoiser."""
    targets = ((name, config.parameters["denoiser"].string_value) for name, config in model.names.items()
               if config is not None and "denoiser" in config.parameters)  # fmt: skip
    return [name for name, target in targets if target == model.folder.name]


def parameters(model: Model) -> Iterator[Fault]:
    """Check that the backend reads each key, and can read its value."""
    keys = NUMBERS.get(model.backend)
    for key, value in model.config.parameters.items():
        text = value.string_value
        if key == "EXECUTION_ENV_PATH" and "$$TRITON_MODEL_DIRECTORY" not in text:
            yield model.warning(f"parameters: {key} '{text}' is a path of this machine", "$$TRITON_MODEL_DIRECTORY/…")
        if keys is None:
            continue
        if key not in keys:
            yield model.warning(f"parameters: backend {model.backend} ignores '{key}'", f"expected {', '.join(keys)}")
        elif key not in TEXTS and not re.fullmatch(r"-?[0-9]{1,18}", text):
            yield model.fault(f"parameters: {key} '{text}' is not a whole number", "write one, as a string")


def warm_up(model: Model) -> Iterator[Fault]:
    """Check that the model takes its own warm-up requests."""
    inputs = {item.name: item for item in model.config.input}
    required = {name for name, item in inputs.items() if not item.optional}
    for warm_up in model.config.model_warmup:
        samples = warm_up.inputs
        for name in sorted(required - samples.keys()):
            yield model.fault(f"model_warmup '{warm_up.name}': input '{name}' is missing", "add it")
        for name in sorted(samples.keys() - inputs.keys()):
            yield model.fault(f"model_warmup '{warm_up.name}': there is no input '{name}'", "remove it")
        for name in sorted(samples.keys() & inputs.keys()):
            item, dims = samples[name], list(inputs[name].dims)
            if item.data_type != inputs[name].data_type:
                yield model.fault(f"model_warmup '{warm_up.name}': '{name}' has another data_type", "write the input's data_type")
            if len(item.dims) != len(dims) or any(a not in (b, -1) for a, b in zip(dims, item.dims, strict=True)):
                problem = f"model_warmup '{warm_up.name}': '{name}' has dims {shown(list(item.dims))}, the input {shown(dims)}"
                yield model.fault(problem, "write the dims of one sample, without the batch")
        if warm_up.batch_size > max(1, model.config.max_batch_size):
            yield model.fault(f"model_warmup '{warm_up.name}': batch_size above max_batch_size", "write a smaller one")


def ensemble(model: Model) -> Iterator[Fault]:
    """Check that the steps name models of this repository, and their tensors."""
    for step in model.config.ensemble_scheduling.step:
        target = model.names.get(step.model_name)
        if step.model_name not in model.names:
            yield model.fault(
                f"ensemble_scheduling: model '{step.model_name}' is not in the repository", "add it, or correct the name"
            )
        if target is None:
            continue
        for mapped, kind in ((step.input_map, "input"), (step.output_map, "output")):
            for name in sorted(mapped.keys() - {item.name for item in getattr(target, kind)}):
                yield model.fault(f"ensemble_scheduling: '{step.model_name}' has no {kind} '{name}'", "correct the name")
