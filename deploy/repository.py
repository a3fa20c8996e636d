"""Writes a Triton model repository: the denoiser, and the models that sample whole pictures with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import onnx_ir as ir

from .backend import BackendError
from .chain import shape_of
from .repository_check import Fault, check_repository
from .serving.model import PARAMETERS
from .serving.schedules import FILE, Schedules

SERVED = Path(__file__).parent / "serving"
PROGRAM = ("model.py", "request.py", "sampler.py", "schedules.py")
"""What a pipeline's folder holds of `serving`."""
CLIENT, README = "client.py", "README.md"
DENOISER, PIPELINE, STREAM = "denoiser", "pipeline", "pipeline_stream"
MOST_ROWS = 16
"""Of a network call, where no plan sets another: a guided picture is two. Measured: larger gains nothing on a processor."""
MOST_REQUESTS, CALLS = 64, 2
INSTALL = "pip install 'dq-export[triton]'"
TYPES = {ir.DataType.FLOAT: "TYPE_FP32", ir.DataType.FLOAT16: "TYPE_FP16", ir.DataType.INT64: "TYPE_INT64"}
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, and how it is asked for.

    Args:
        backend: Triton's: `onnxruntime` or `tensorrt`.
        model: the graph, with its external data beside it.
        plan: for tensorrt; None where it is still to be built, with `finish`.
        most_rows: the greatest batch of a network call.
        classes: number of labels without the null label.
        steps, guidance, scheduler: what a request gets that does not say.
    """

    backend: str
    model: Path
    plan: Path | None
    most_rows: int
    classes: int
    steps: int
    guidance: float
    scheduler: str
    schedules: Schedules


def require_triton() -> None:
    """Ask for what writing and checking a repository needs.

    Raises:
        BackendError: Triton's client library, which holds the format of config.pbtxt, is missing.
    """
    try:
        import tritonclient.grpc.model_config_pb2  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendError(f"tritonclient is not installed; {INSTALL}, needed for a Triton repository") from error


def write_repository(served: Served, folder: Path) -> list[Fault]:
    """Write the models `denoiser`, `pipeline` and `pipeline_stream`, a client and a README to `folder`, and check them.

    Returns:
        What the check of the finished repository says; a plan that is still to be built is no fault here.

    Raises:
        BackendError: tritonclient is missing, or the repository would not load.
    """
    require_triton()
    model = ir.load(served.model)
    graph = model.graph
    inputs = {str(value.name): _tensor(value) for value in graph.inputs}
    (output,) = (_tensor(value) for value in graph.outputs)
    (folder / DENOISER / "1").mkdir(parents=True)
    _write_config(folder, _denoiser(served, inputs, output))
    if served.backend == "tensorrt":
        if served.plan:
            add_plan(served.plan, folder)
    else:
        for path in (served.model, served.model.with_name(f"{served.model.name}.data")):
            shutil.copyfile(path, folder / DENOISER / "1" / path.name)
    for name in (PIPELINE, STREAM):
        target = folder / name / "1"
        target.mkdir(parents=True)
        for file in PROGRAM:
            shutil.copyfile(SERVED / file, target / file)
        served.schedules.save(target / FILE)
        _write_config(folder, _pipeline(name, served, inputs["hidden_states"]["dims"]))
    shutil.copyfile(SERVED / CLIENT, folder / CLIENT)
    text = _readme(served, inputs["hidden_states"]["dims"], model.opset_imports[""])
    (folder / README).write_text(text, encoding="utf-8")
    faults = [item for item in check_repository(folder) if served.plan or "model.plan" not in item.what]
    wrong = [f"{item.model}: {item.what}" for item in faults if item.severity == "error"]
    if wrong:
        raise BackendError(f"{folder}: the repository would not load:\n  " + "\n  ".join(wrong))
    return faults


def add_plan(plan: Path, folder: Path) -> None:
    """Put a plan into a repository, under its own name only when it is whole."""
    partial = folder / DENOISER / "1" / ".model.plan.new"
    shutil.copyfile(plan, partial)
    partial.rename(folder / DENOISER / "1" / "model.plan")


def _tensor(value: ir.Value) -> dict[str, Any]:
    """A config's entry: dims are of one sample; a number a sample is [1] there and no dimension in the graph."""
    assert value.dtype is not None
    assert value.name is not None
    dims = [size or -1 for size in shape_of(value)[1:]]
    entry: dict[str, Any] = {"name": value.name, "data_type": TYPES[value.dtype], "dims": dims or [1]}
    return entry if dims else {**entry, "reshape": {"shape": []}}


def _denoiser(served: Served, inputs: Mapping[str, Config], output: Config) -> Config:
    def warm_up(name: str, rows: int) -> Config:
        given = {
            key: {"data_type": item["data_type"], "dims": item["dims"],
                  **({"random_data": True} if "FP" in item["data_type"] else {"zero_data": True})}
            for key, item in inputs.items()
        }  # fmt: skip
        return {"name": name, "batch_size": rows, "inputs": given}

    return {
        "name": DENOISER,
        "backend": served.backend,
        "max_batch_size": served.most_rows,
        "input": list(inputs.values()),
        "output": [output],
        "instance_group": [{"count": 1, "kind": "KIND_GPU" if served.backend == "tensorrt" else "KIND_CPU"}],
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
        "model_warmup": [warm_up("one row", 1), warm_up("the most rows", served.most_rows)],
    }


def _pipeline(name: str, served: Served, shape: list[int]) -> Config:
    streams, pictures = name == STREAM, shape[0] in (1, 3)
    given = [("class_labels", "TYPE_INT64", [-1]), ("seed", "TYPE_UINT64", [1]), ("num_inference_steps", "TYPE_INT32", [1])]
    given += [("guidance_scale", "TYPE_FP32", [1]), ("scheduler", "TYPE_STRING", [1]), ("latents", "TYPE_FP32", [-1, *shape])]
    made = [("latents", "TYPE_FP32", [-1, *shape]), ("seed", "TYPE_UINT64", [1])]
    made += [("images", "TYPE_UINT8", [-1, *shape[1:], shape[0]])] if pictures else []
    if streams:
        given, made = [*given, ("preview_every", "TYPE_INT32", [1])], [*made, ("step", "TYPE_INT32", [1])]
    values = {
        "denoiser": DENOISER, "classes": served.classes, "max_images": max(1, served.most_rows // 2),
        "max_rows": served.most_rows, "max_requests": MOST_REQUESTS, "denoiser_calls": CALLS,
        "num_inference_steps": served.steps, "guidance_scale": served.guidance, "scheduler": served.scheduler,
        "schedulers": ",".join(served.schedules.tables),
    }  # fmt: skip
    entry = {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": [
            {"name": key, "data_type": kind, "dims": dims, **({} if key == "class_labels" else {"optional": True})}
            for key, kind, dims in given
        ],
        "output": [{"name": key, "data_type": kind, "dims": dims} for key, kind, dims in made],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {key: {"string_value": str(values[key])} for key in PARAMETERS},
    }
    return {**entry, "model_transaction_policy": {"decoupled": True}} if streams else entry


def _write_config(folder: Path, config: Config) -> None:
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    message = json_format.ParseDict(config, model_config_pb2.ModelConfig())
    (folder / config["name"] / "config.pbtxt").write_text(text_format.MessageToString(message), encoding="utf-8")


def _readme(served: Served, shape: list[int], opset: int) -> str:
    template = Template((SERVED / README).read_text(encoding="utf-8"))
    gpus = "--gpus all " if served.backend == "tensorrt" else ""
    return template.substitute(
        backend=served.backend, gpus=gpus, needs=_needs(served, opset), classes=served.classes - 1, rows=served.most_rows,
        images=max(1, served.most_rows // 2), requests=MOST_REQUESTS, steps=served.steps, guidance=f"{served.guidance:g}",
        scheduler=served.scheduler, schedulers=", ".join(f"`{name}`" for name in served.schedules.tables),
        most_steps=served.schedules.most, shape=", ".join(map(str, shape)), calls=CALLS,
        waiting="" if served.plan or served.backend == "onnxruntime" else PLANLESS,
    )  # fmt: skip


def _needs(served: Served, opset: int) -> str:
    if served.backend == "tensorrt":
        return (
            "The container's TensorRT must be the version that built the plan: a plan of another is refused. This tells it:\n"
            "`docker run --rm \"$TRITON_IMAGE\" sh -c 'ls /usr/lib/*/libnvinfer.so.*'`."
        )
    if opset >= 23:
        return f"The graph's opset {opset} needs ONNX Runtime 1.24: containers from 26.02 on."
    return f"The graph's opset {opset} runs on ONNX Runtime 1.19 and later: containers from 24.09 on."


PLANLESS = """
**The plan is not here yet.** `dq-export finish OUT` on the GPU machine builds it and puts it into `denoiser/1/`.
"""
