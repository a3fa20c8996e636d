"""Writes a Triton model repository: the denoiser, and the models that sample whole pictures with it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import Template

import onnx_ir as ir

from ..backend import BackendError
from ..check.operand import shape_of
from .check import check_repository
from .model_config import (
    CALLS,
    DECODER,
    DENOISER,
    MOST_REQUESTS,
    PIPELINE,
    STREAM,
    Config,
    Served,
    dump,
    health_config,
    network_config,
    pipeline_config,
)
from .model_folder import Fault
from .serving.schedules import FILE

SERVED = Path(__file__).parent / "serving"
PROGRAM = ("model.py", "request.py", "sampler.py", "schedules.py")
"""What a pipeline's folder holds of `serving`."""
CLIENT, README, PROXY = "client.py", "README.md", "nginx.conf"
PROBE = "health.py"
"""What the model `health` runs."""
INSTALL = "pip install 'dq-export[triton]'"


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
    """Write the models `denoiser`, `pipeline`, `pipeline_stream`, `health` and, for latents, `decoder`; check them.

    Beside them lie a client, a configuration of nginx and a README.

    Returns:
        What the check of the finished repository says; a plan that is still to be built is no fault here.

    Raises:
        BackendError: tritonclient is missing, the engine takes no batch of two, or the repository would not load.
    """
    require_triton()
    if served.most_rows < 2:
        raise BackendError("--triton: a guided picture is two rows of a call, --max-shapes allows one; allow two or more")
    model = ir.load(served.model)
    shape = [int(size or 0) for size in shape_of(next(v for v in model.graph.inputs if v.name == "hidden_states"))[1:]]
    kind = "KIND_GPU" if served.backend == "tensorrt" else "KIND_CPU"
    target = _add(folder, network_config(DENOISER, model.graph, served.backend, kind, served.most_rows))
    if served.backend == "tensorrt":
        if served.plan:
            add_plan(served.plan, folder)
    else:
        for path in (served.model, served.model.with_name(f"{served.model.name}.data")):
            shutil.copyfile(path, target / path.name)
    image = [*shape[1:], shape[0]] if served.pictures else []
    if served.decoder:
        image = _add_decoder(served.decoder, kind, folder)
    for name in (PIPELINE, STREAM):
        target = _add(folder, pipeline_config(name, served, shape, image))
        for file in PROGRAM:
            shutil.copyfile(SERVED / file, target / file)
        served.schedules.save(target / FILE)
    shutil.copyfile(SERVED / PROBE, _add(folder, health_config(shape)) / "model.py")
    shutil.copyfile(SERVED / CLIENT, folder / CLIENT)
    (folder / PROXY).write_text(_proxy(served, shape), encoding="utf-8")
    (folder / README).write_text(_readme(served, shape, model.opset_imports[""]), encoding="utf-8")
    faults = [item for item in check_repository(folder) if served.plan or "model.plan" not in item.what]
    wrong = [f"{item.model}: {item.what}" for item in faults if item.severity == "error"]
    if wrong:
        raise BackendError(f"{folder}: the repository would not load:\n  " + "\n  ".join(wrong))
    return faults


def add_plan(plan: Path, folder: Path) -> None:
    """Put a plan into a repository, under its own name only when it is whole."""
    partial = folder / DENOISER / "1" / ".model.plan.new"
    partial.unlink(missing_ok=True)  # copying into what stands there would write through a hard link
    shutil.copyfile(plan, partial)
    partial.rename(folder / DENOISER / "1" / "model.plan")


def _add(folder: Path, config: Config) -> Path:
    """A model's folder with its config.pbtxt; returns that of its version."""
    version: Path = folder / config["name"] / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(dump(config), encoding="utf-8")
    return version


def _add_decoder(decoder: Path, kind: str, folder: Path) -> list[int]:
    """Move the decoder in; a picture a call, which bounds its memory. Returns its picture's (H, W, C)."""
    graph = ir.load(decoder).graph
    target = _add(folder, network_config(DECODER, graph, "onnxruntime", kind, 1))
    for path in sorted(decoder.parent.iterdir()):
        path.rename(target / path.name)
    channels, height, width = (int(size or 0) for size in shape_of(graph.outputs[0])[1:])
    return [height, width, channels]


def _readme(served: Served, shape: Sequence[int], opset: int) -> str:
    template = Template((SERVED / README).read_text(encoding="utf-8"))
    return template.substitute(
        backend=served.backend,
        needs=_needs(served, opset),
        gpus="--gpus all " if served.backend == "tensorrt" else "",
        classes=served.classes - 1,
        rows=served.most_rows,
        images=served.most_images,
        requests=MOST_REQUESTS,
        calls=CALLS,
        steps=served.steps,
        guidance=f"{served.guidance:g}",
        scheduler=served.scheduler,
        schedulers=", ".join(f"`{name}`" for name in served.schedules.tables),
        most_steps=served.schedules.most,
        shape=", ".join(map(str, shape)),
        megabytes=_megabytes(served, shape),
        pictures="`images` UINT8[n, H, W, C]" if served.pictures or served.decoder else "no `images`: there is no decoder here",
        decoder=DECODED if served.decoder else "",
        waiting="" if served.plan or served.backend == "onnxruntime" else PLANLESS,
    )


def _proxy(served: Served, shape: Sequence[int]) -> str:
    """nginx's configuration: the shapes that JSON may name, and a body of the largest request, rounded up to MB."""
    template = Template((SERVED / PROXY).read_text(encoding="utf-8"))
    return template.substitute(shape="\\s*+,\\s*+".join(map(str, shape)), megabytes=_megabytes(served, shape))


def _megabytes(served: Served, shape: Sequence[int]) -> int:
    """More than the largest request has: float32 latents for each row of a call."""
    return 1 + math.ceil(served.most_rows * math.prod(shape) * 4 / 1e6)


def _needs(served: Served, opset: int) -> str:
    if served.backend == "tensorrt":
        return (
            "The container's TensorRT must be the version that built the plan: a plan of another is refused. This tells it:\n"
            "`docker run --rm \"$TRITON_IMAGE\" sh -c 'ls /usr/lib/*/libnvinfer.so.*'`."
        )
    if opset >= 23:
        return f"The graph's opset {opset} needs ONNX Runtime 1.24: containers from 26.02 on."
    return f"The graph's opset {opset} runs on ONNX Runtime 1.19 and later: containers from 24.09 on."


DECODED = "\n| `decoder` | onnxruntime | one picture's `latents`, its scaling undone inside | `sample` FP32 in [-1, 1] |"
PLANLESS = """
**The plan is not here yet.** `dq-export finish OUT` on the GPU machine builds it and puts it into `denoiser/1/`.
"""
