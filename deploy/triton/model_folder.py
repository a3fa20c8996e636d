"""One model's folder of a repository, and what can be wrong with it."""

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
"""Bytes of a file's name on Linux."""


def type_of(entry: Any) -> str:
    """The name of a config entry's element type, such as `TYPE_FP32`."""
    value = entry.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number.get(entry.data_type)
    return str(value.name) if value else f"{entry.data_type}, which is no type"


def whole(text: str, default: int = 0) -> int:
    """A parameter's value as the server reads it, in ASCII digits without sign; `default` where it is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else default


def content(path: Path, root: Path, limit: int) -> bytes:
    """The bytes of a file of a repository.

    Args:
        root: of the repository, which no link may leave.

    Raises:
        DocumentError: the file lies elsewhere, or `read_bytes` refuses it.
    """
    # realpath ends at a loop of links, where Path.resolve raises.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise DocumentError(f"{printable(path.name)}: a link out of the repository is not read")
    if path.is_file() and path.stat().st_size > limit:  # before a GB of it is read
        raise DocumentError(f"{printable(path.name)}: {path.stat().st_size} bytes, expected at most {limit}")
    return read_bytes(path, limit)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong.

    Args:
        model: its folder's name; empty for the repository.
        severity: `error`: the model does not load, or not as written; `warning`: it loads, and does not do what it seems to.
        what: the field or file, and what was found; made one line without control characters.
        fix: what to do.
    """

    model: str
    severity: Literal["error", "warning"]
    what: str
    fix: str

    def __post_init__(self) -> None:
        for name in ("model", "what", "fix"):
            object.__setattr__(self, name, printable(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model's folder.

    Args:
        config: Triton's ModelConfig message.
        names: the repository's models with their configs; None where one cannot be read, which is told already.
    """

    folder: Path
    config: Any
    names: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """As Triton finds it, from `backend` or the older `platform`."""
        return str(self.config.backend or PLATFORMS.get(self.config.platform, ""))

    @property
    def versions(self) -> list[Path]:
        """The folders that the server takes for versions: named by a decimal number that does not start with 0."""
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"[1-9][0-9]{0,17}", path.name) and path.is_dir())

    @property
    def file(self) -> str:
        """What each version's folder must hold."""
        return str(self.config.default_model_filename or FILES.get(self.backend, ""))

    def read(self, path: Path, limit: int) -> bytes:
        """See `content`."""
        return content(path, self.folder.parent, limit)

    def fault(self, what: str, fix: str) -> Fault:
        """Something that does not load, or not as written."""
        return Fault(model=self.folder.name, severity="error", what=what, fix=fix)

    def warning(self, what: str, fix: str) -> Fault:
        """Something that loads and does not do what it seems to."""
        return Fault(model=self.folder.name, severity="warning", what=what, fix=fix)
