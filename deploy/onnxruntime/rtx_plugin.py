"""ONNX Runtime's plug-in of TensorRT-RTX."""

from __future__ import annotations

from functools import cache
from typing import Any

from dq_export.core.documents import printable

from ..backend import BackendError
from ..packages import require_packages
from ..tensorrt.runner import compute_capability
from .cpu import onnxruntime, session_errors

PROVIDER = "NvTensorRTRTXExecutionProvider"
MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
MEMORY = ("gpu", 0, 0x10DE)
"""Its first GPU's memory, by NVIDIA's PCI vendor id."""
TARGETS = ("sm86", "sm89", "sm120", "sm121")
"""The GPUs that it runs on, in version 0.5."""


@cache
def gpus() -> list[Any]:
    """The OrtEpDevices that the plug-in runs on.

    Raises:
        BackendError: it is not installed, or its library cannot be loaded.
    """
    require_packages([MODULE], "--provider tensorrt-rtx")
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    ort = onnxruntime()
    try:
        ort.register_execution_provider_library(PROVIDER, plugin.get_library_path())
    except session_errors() as error:
        raise BackendError(f"the TensorRT-RTX plug-in of ONNX Runtime cannot be loaded: {printable(str(error))}") from error
    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]


def obstacle() -> str:
    """The reason that the plug-in runs nothing here; empty if it runs plans."""
    capability = compute_capability()
    if not capability:
        return "this machine shows no NVIDIA GPU"
    try:
        devices = gpus()
    except BackendError as error:
        return str(error)
    return "" if devices else f"the TensorRT-RTX plug-in of ONNX Runtime runs on {', '.join(TARGETS)}, this GPU is {capability}"
