"""The folder of one model of a repository, and its faults."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dq_export.core.documents import DocumentError, printable, read_bytes

FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
PLATFORMS = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt", "ensemble": "ensemble"}
NAME_LIMIT = 255
"""The greatest length in bytes of a file name on Linux."""


def has_type(entry: Any) -> bool:
    """Whether the number of a config entry's element type is one of Triton's."""
    return entry.data_type in entry.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number


def type_of(entry: Any) -> str:
    """The name of a config entry's element type, such as `TYPE_FP32`."""
    value = entry.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number.get(entry.data_type)
    return str(value.name) if value else f"{entry.data_type}, which is not a type"


def whole_number(text: str, default: int = 0) -> int:
    """Read a parameter as the server does: ASCII digits without a sign. Return `default` for any other text."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else default


def content(path: Path, root: Path, limit: int) -> bytes:
    """Return the bytes of a file of a repository.

    Args:
        root: folder of the repository; no link may leave it.

    Raises:
        DocumentError: the file lies elsewhere, or `read_bytes` refuses it.
    """
    # realpath ends at a loop of links, where Path.resolve raises.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise DocumentError(f"{printable(path.name)}: a link out of the repository is not read")
    if path.is_file() and path.stat().st_size > limit:  # refused before gigabytes of it are read
        raise DocumentError(f"{printable(path.name)}: {path.stat().st_size} bytes, expected at most {limit}")
    return read_bytes(path, limit)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of a repository.

    Args:
        model: name of the model's folder; empty for the whole repository.
        severity: `error`: the model does not load, or not as written. `warning`: it loads, and a setting has no effect.
        problem: the field or file, and its value. Written as one line without control characters.
        fix: the change that corrects it.
    """

    model: str
    severity: Literal["error", "warning"]
    problem: str
    fix: str

    def __post_init__(self) -> None:
        for name in ("model", "problem", "fix"):
            object.__setattr__(self, name, printable(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model's folder.

    Args:
        config: Triton's ModelConfig message.
        names: config of each model of the repository by name; None for a config that could not be read.
    """

    folder: Path
    config: Any
    names: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """The backend's name, from the field `backend` or the older `platform`."""
        return str(self.config.backend or PLATFORMS.get(self.config.platform, ""))

    @property
    def versions(self) -> list[Path]:
        """The version folders. Their names are decimal numbers that do not start with 0."""
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"[1-9][0-9]{0,17}", path.name) and path.is_dir())

    @property
    def file(self) -> str:
        """Name of the file that each version folder must hold."""
        return str(self.config.default_model_filename or FILES.get(self.backend, ""))

    def read(self, path: Path, limit: int) -> bytes:
        """Return the bytes of a file of the repository; see `content`."""
        return content(path, self.folder.parent, limit)

    def fault(self, problem: str, fix: str) -> Fault:
        """Return an error: the model does not load, or not as written."""
        return Fault(model=self.folder.name, severity="error", problem=problem, fix=fix)

    def warning(self, problem: str, fix: str) -> Fault:
        """Return a warning: the model loads, and a setting has no effect."""
        return Fault(model=self.folder.name, severity="warning", problem=problem, fix=fix)
