"""What this machine can build, run and serve."""

from __future__ import annotations

import importlib.util
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dq_export.core.documents import printable
from dq_export.deploy.check.rules_nvidia import TARGETS
from dq_export.deploy.child import run_child
from dq_export.deploy.packages import install_command
from dq_export.deploy.tensorrt.runner import compute_capability

from .machine import FLOAT_FEATURES, INTEGER_FEATURES, cpu_flags, cpu_name, installed

MISSING = "missing"
FIRST_FP8 = 89
"""The first compute capability whose GEMMs take float8."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One part of the machine.

    Args:
        state: its version or name, `missing`, or why it does not work.
        purpose: what it is for, as options.
        remedy: the command that adds it; empty where it is there.
    """

    part: str
    state: str
    purpose: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Library:
    """Modules that are imported together for one purpose.

    Args:
        distributions: whose version is shown: the first that is installed.
        gpu: what only a machine with an NVIDIA GPU does with it; empty: nothing.
        cuda: the option that needs the library's own support of CUDA; empty: none.
    """

    title: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    purpose: str
    gpu: str = ""
    cuda: str = ""


LIBRARIES = (
    Library(
        title="PyTorch and diffusers",
        modules=("torch", "diffusers", "accelerate", "onnxscript", "polygraphy"),
        distributions=("torch",),
        purpose="every export",
        cuda="--device cuda",
    ),
    Library(
        title="ONNX Runtime",
        modules=("onnxruntime",),
        distributions=("onnxruntime", "onnxruntime-gpu"),
        purpose="quantize, verify; builds and runs --format ort",
        cuda="--provider cuda",
    ),
    Library(
        title="OpenVINO",
        modules=("onnxruntime", "openvino", "onnxruntime_ep_openvino"),
        distributions=("openvino",),
        purpose="builds and runs --provider openvino",
    ),
    Library(
        title="TensorRT-RTX",
        modules=("tensorrt_rtx",),
        distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        purpose="builds --format trt-rtx",
        gpu="runs its plans",
    ),
    Library(
        title="TensorRT-RTX in ONNX Runtime",
        modules=("onnxruntime", "onnxruntime_ep_nv_tensorrt_rtx"),
        distributions=("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12"),
        purpose="--provider tensorrt-rtx",
        gpu="runs its plans",
    ),
    Library(
        title="TensorRT",
        modules=("tensorrt",),
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        purpose="--format trt",
        gpu="builds and runs its plans",
    ),
    Library(
        title="text encoders",
        modules=("transformers", "tokenizers", "sentencepiece"),
        distributions=("transformers",),
        purpose="text to image: --prompts",
    ),
    Library(
        title="Triton's client",
        modules=("tritonclient.grpc",),
        distributions=("tritonclient",),
        purpose="writes and checks a model repository: --triton",
    ),
)


def diagnose() -> list[Diagnosis]:
    """The processor, the GPU, every library, each imported in a process of its own, and the server."""
    capability = compute_capability()
    with ThreadPoolExecutor(len(LIBRARIES)) as pool:
        libraries = list(pool.map(lambda library: _library(library, capability), LIBRARIES))
    return [_cpu(), _gpu(capability), *libraries, _server()]


def _cpu() -> Diagnosis:
    flags = cpu_flags()
    integers = [name for flag, name in INTEGER_FEATURES.items() if flag in flags]
    floats = [name for flag, name in FLOAT_FEATURES.items() if flag in flags]
    if not flags:
        purpose = "its instructions are not known here"
    elif integers:
        purpose = f"fast 8-bit GEMMs: {', '.join(integers)}"
    else:
        purpose = "no instructions for 8-bit GEMMs: --bits w8a8 gains little speed"
    return Diagnosis(part="CPU", state=cpu_name(), purpose=purpose + (f"; bfloat16: {', '.join(floats)}" if floats else ""))


def _gpu(capability: str) -> Diagnosis:
    if not capability:
        return Diagnosis(part="NVIDIA GPU", state="none", purpose="to run plans, and to build those of --format trt")
    option = f"--target {capability}" if capability in TARGETS else "--format trt: TensorRT-RTX does not run there"
    kinds = "INT8 and FP8" if int(capability.removeprefix("sm")) >= FIRST_FP8 else "INT8"
    return Diagnosis(part="NVIDIA GPU", state=capability, purpose=f"plans with {kinds} GEMMs; {option}")


def _library(library: Library, capability: str) -> Diagnosis:
    """What a library is good for here, or why it is not."""
    purpose = library.purpose
    if library.gpu:
        purpose += f"; {library.gpu}" if capability else f"; an NVIDIA GPU {library.gpu}"
    missing = [name for name in library.modules if importlib.util.find_spec(name.partition(".")[0]) is None]
    if missing:
        remedy = install_command(name.partition(".")[0] for name in missing)
        return Diagnosis(part=library.title, state=MISSING, purpose=purpose, remedy=remedy)
    answers: list[dict[str, Any]] = []
    child = run_child("dq_export.deploy.probe", list(library.modules), answers.append)
    versions = installed(library.distributions)
    if child.status:
        reason = f"cannot be imported: {printable(child.reason)}"
        # Without --no-deps pip would also load PyTorch anew, which is gigabytes.
        remedy = f"pip install --force-reinstall --no-deps {next(iter(versions), library.distributions[0])}"
        return Diagnosis(part=library.title, state=reason, purpose=purpose, remedy=remedy)
    if library.cuda and any(answer["cuda"] for answer in answers):
        purpose += f", also with {library.cuda}"
    return Diagnosis(part=library.title, state=next(iter(versions.values()), "installed"), purpose=purpose)


def _server() -> Diagnosis:
    path = shutil.which("tritonserver")
    remedy = "" if path else "no pip package; NVIDIA's container has it"
    return Diagnosis(part="tritonserver", state=path or MISSING, purpose="serves OUT/triton", remedy=remedy)
