"""What an export runs on: installed distributions, and the processor."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

DECIDING = ("dq-export", "torch", "diffusers", "numpy", "onnx-ir", "onnxruntime")
"""Distributions that decide the bytes of every export."""


def versions() -> dict[str, str]:
    """Versions of the distributions that decide the bytes of every export."""
    return {**dict.fromkeys(DECIDING, "not installed"), **installed(DECIDING)}


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions of these names that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
