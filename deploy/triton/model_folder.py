"""One model's folder of a repository, and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
PLATFORMS = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt", "ensemble": "ensemble"}


def type_of(entry: Any) -> str:
    """The name of a config entry's element type, such as `TYPE_FP32`."""
    return str(entry.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[entry.data_type].name)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong.

    Args:
        model: its folder's name; empty for the repository.
        severity: `error`: the model does not load, or not as written; `warning`: it loads, and does not do what it seems to.
        what: the field or file, and what was found.
        fix: what to do.
    """

    model: str
    severity: Literal["error", "warning"]
    what: str
    fix: str


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
        """The folders that are named by a number."""
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit())

    @property
    def file(self) -> str:
        """What each version's folder must hold."""
        return str(self.config.default_model_filename or FILES.get(self.backend, ""))

    def fault(self, what: str, fix: str) -> Fault:
        """Something that does not load, or not as written."""
        return Fault(model=self.folder.name, severity="error", what=what, fix=fix)

    def warning(self, what: str, fix: str) -> Fault:
        """Something that loads and does not do what it seems to."""
        return Fault(model=self.folder.name, severity="warning", what=what, fix=fix)
