"""Writes a Triton model repository: the denoiser, and the models that sample whole pictures with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from ..backend import BackendError
from ..check.operand import shape_of
from .check import check_repository
from .model_config import (
    DECODER,
    DENOISER,
    ENCODER,
    MODEL,
    PIPELINE,
    STREAM,
    Config,
    Served,
    denoiser_config,
    dump,
    health_config,
    network_config,
    open_latents,
    pipeline_config,
)
from .model_folder import Fault
from .readme import PROXY, README, SERVED, proxy, readme
from .serving.schedules import FILE

PROGRAM = (
    "model.py", "call.py", "conditions.py", "job.py", "positions.py", "request.py", "sampler.py", "schedules.py", "sizes.py",
)  # fmt: skip
"""Files of `serving` that each pipeline's version folder gets."""
CLIENT = "client.py"
ENDPOINT = ("images.py", "compose.yaml")
FRONT = SERVED.parent / "endpoint"
"""Files of the images endpoint of models with prompts, and the folder that holds them here."""
LATENTS = "latents"
"""The decoder's input."""
PROBE = "health.py"
"""The program of the model `health`."""
INSTALL = "pip install 'dq-export[triton]'"


def require_triton() -> None:
    """Check that the packages for writing and checking a repository are installed.

    Raises:
        BackendError: Triton's client library, which holds the format of config.pbtxt, is missing.
    """
    try:
        import tritonclient.grpc.model_config_pb2  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendError(f"tritonclient is not installed; {INSTALL}, needed for a Triton repository") from error


def write_repository(served: Served, folder: Path) -> list[Fault]:
    """Write a model repository, and check it.

    Its models are `denoiser`, `pipeline`, `pipeline_stream` and `health`; `text_encoder` if requests hold prompts; `decoder`
    if the latents need one. Beside them lie a client, a configuration of nginx, a README, and, if prompts become pictures, an
    endpoint with OpenAI's interface.

    Returns:
        The faults of the finished repository. A plan that is built later is not a fault.

    Raises:
        BackendError: tritonclient is missing, the engine takes no batch of two, or the repository would not load.
    """
    require_triton()
    if served.max_rows < served.call.rows_of_picture:
        raise BackendError("--triton: a guided picture takes two rows of a call, --max-shapes allows one; allow two or more")
    model, shape = ir.load(served.model), served.latents
    kind = "KIND_GPU" if served.backend == "tensorrt" else "KIND_CPU"
    health = health_config(served)  # reads the text encoder's graph before it is moved
    target = _add(folder, denoiser_config(served, model.graph, kind))
    if served.backend == "tensorrt":
        if served.plan:
            add_plan(served.plan, folder)
    else:
        for path in (served.model, served.model.with_name(f"{served.model.name}.data")):
            shutil.copyfile(path, target / path.name)
    sides = [-1 if side.varies else side.default for side in (served.sizes.height, served.sizes.width)]
    image = [*sides, shape[0]] if served.pictures else []
    if served.decoder:
        image = [*sides, _add_decoder(served, served.decoder, kind, folder)]
    for name in (PIPELINE, STREAM):
        target = _add(folder, pipeline_config(name, served, image))
        for file in PROGRAM:
            shutil.copyfile(SERVED / file, target / file)
        for file in served.call.tokenizers:
            assert served.encoder is not None
            shutil.copyfile(served.encoder / file, target / file)
        served.schedules.save(target / FILE)
        served.call.save(target)
    if served.encoder:
        _add_encoder(served, kind, folder)
    shutil.copyfile(SERVED / PROBE, _add(folder, health) / "model.py")
    shutil.copyfile(SERVED / CLIENT, folder / CLIENT)
    for file in ENDPOINT if served.encoder and image else ():
        shutil.copyfile(FRONT / file, folder / file)
    (folder / PROXY).write_text(proxy(served), encoding="utf-8")
    (folder / README).write_text(readme(served, model.opset_imports[""]), encoding="utf-8")
    faults = [item for item in check_repository(folder) if served.plan or "model.plan" not in item.problem]
    errors = [f"{item.model}: {item.problem}" for item in faults if item.severity == "error"]
    if errors:
        raise BackendError(f"{folder}: the repository would not load:\n  " + "\n  ".join(errors))
    return faults


def add_plan(plan: Path, folder: Path) -> None:
    """Copy a plan into a repository. It gets its final name when the copy is complete."""
    partial = folder / DENOISER / "1" / ".model.plan.new"
    partial.unlink(missing_ok=True)  # a copy onto an existing file would write through its hard links
    shutil.copyfile(plan, partial)
    partial.rename(folder / DENOISER / "1" / "model.plan")


def _add(folder: Path, config: Config) -> Path:
    """Make a model's folder with its config.pbtxt, and return the folder of version 1."""
    version: Path = folder / config["name"] / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(dump(config), encoding="utf-8")
    return version


def _add_decoder(served: Served, decoder: Path, kind: str, folder: Path) -> int:
    """Move the decoder in, with one picture a call to bound its memory. Return the channels of its pictures."""
    graph = ir.load(decoder).graph
    config = network_config(DECODER, graph, "onnxruntime", kind, 1, {LATENTS: served.latents})
    target = _add(folder, open_latents(config, LATENTS, served))
    for path in sorted(decoder.parent.iterdir()):
        path.rename(target / path.name)
    return int(shape_of(graph.outputs[0])[1] or 0)


def _add_encoder(served: Served, kind: str, folder: Path) -> None:
    """Move the text encoder in, with one prompt a call, so that its output does not depend on other prompts."""
    assert served.encoder is not None
    graph = ir.load(served.encoder / MODEL).graph
    target = _add(folder, network_config(ENCODER, graph, "onnxruntime", kind, 0))
    for path in sorted(served.encoder.iterdir()):
        if path.name not in served.call.tokenizers:
            path.rename(target / path.name)
