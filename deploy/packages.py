"""Check that the packages of a command are installed, before it starts to work."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from .backend import BackendError

EXTRAS = {
    "onnxruntime": "cpu",
    "openvino": "cpu,openvino",
    "onnxruntime_ep_openvino": "cpu,openvino",
    "tensorrt": "trt",
    "tensorrt_rtx": "rtx",
    "onnxruntime_ep_nv_tensorrt_rtx": "rtx-provider",
    "tritonclient": "triton",
    "transformers": "text",
    "tokenizers": "text",
    "sentencepiece": "text",
}
"""The extra of dq-export that installs a module; all other modules are installed with dq-export itself."""
PROJECTS = {
    "onnx_graphsurgeon": "onnx-graphsurgeon",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx",
    "onnxruntime_ep_openvino": "onnxruntime-ep-openvino",
    "PIL": "pillow",
}
"""The packages whose names differ from their modules'."""


def require_packages(modules: Iterable[str], purpose: str) -> None:
    """Check that modules are installed, without importing them.

    Args:
        purpose: the command or option that needs them.

    Raises:
        BackendError: some are missing; the message names them, the command that installs them, and the purpose.
    """
    missing = [module for module in dict.fromkeys(modules) if importlib.util.find_spec(module) is None]
    if missing:
        names = " and ".join(PROJECTS.get(module, module) for module in missing)
        raise BackendError(
            f"{names} {'is' if len(missing) == 1 else 'are'} not installed; {install_command(missing)}, needed for {purpose}"
        )


def install_command(modules: Iterable[str]) -> str:
    """The pip command that installs the modules."""
    extras = sorted({extra for module in modules if module in EXTRAS for extra in EXTRAS[module].split(",")})
    return f"pip install 'dq-export[{','.join(extras)}]'" if extras else "pip install dq-export"
