"""What an export runs on: installed distributions, and the processor."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

DECIDING = ("dq-export", "torch", "diffusers", "numpy", "onnx-ir", "onnxruntime")
"""Distributions that decide the bytes of every export."""
INTEGER_FEATURES = {
    "amx_int8": "AMX-INT8", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "i8mm": "I8MM", "asimddp": "dot product",
}  # fmt: skip
"""Instructions that multiply and sum 8-bit integers, by Linux's name: the kernels of w8a8 are fast with any of them."""
FLOAT_FEATURES = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "BF16"}
"""Instructions on bfloat16, by Linux's name."""


def versions() -> dict[str, str]:
    """Versions of the distributions that decide the bytes of every export."""
    return {**dict.fromkeys(DECIDING, "not installed"), **installed(DECIDING)}


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions of these names that are installed."""
    version_of = {}
    for name in names:
        try:
            version_of[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return version_of


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    return _of_cpu("model name") or platform.processor()


def cpu_flags() -> frozenset[str]:
    """The processor's features by Linux's names; empty where the system does not list them."""
    return frozenset((_of_cpu("flags") or _of_cpu("Features")).split())


def _of_cpu(key: str) -> str:
    """The value of the first line of /proc/cpuinfo that starts with `key`; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
