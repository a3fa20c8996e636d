"""A plan on disk: the library's file, its list of layers, and a description."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dq_export.core.digest import file_digest
from dq_export.core.documents import DocumentError, printable, read_json, read_text, shown_path

from ..backend import BackendError, Built
from ..check.rules_nvidia import TARGETS
from .builder import PlanReport, PlanRequest
from .layers import Layer, read_layers

PLAN, LAYERS, METADATA = "model.plan", "layers.txt", "plan.json"
LAYERS_LIMIT = 256 << 20
"""The greatest size of the list of layers in bytes; DiT-XL/2's has 2 million."""


@dataclass(frozen=True)
class Plan:
    """The plan of an engine.

    Args:
        built: the engine; its folder has the files.
    """

    built: Built

    @property
    def file(self) -> Path:
        """What the library loads."""
        return self.built.folder / PLAN

    @property
    def advice(self) -> str:
        """What to do if it cannot be used."""
        return f"run `dq-export finish {self.built.model.parent}`"

    def describe(self, request: PlanRequest, report: PlanReport, **values: Any) -> None:
        """Write the list of layers, and `plan.json`: library, time, memory and digest of a build, and further values."""
        (self.built.folder / LAYERS).write_text(report.layers)
        description = {
            "library": f"{request.module} {report.version}",
            "profiles": request.profiles,
            "seconds": report.seconds,
            "peak_bytes": report.peak_bytes,
            "sha256": report.sha256,
            **values,
        }
        (self.built.folder / METADATA).write_text(json.dumps(description, indent=1) + "\n")

    @cached_property
    def description(self) -> dict[str, Any]:
        """The content of `plan.json`; a run needs its keys `library`, `sha256` and `targets`.

        Raises:
            BackendError: it or the plan is missing, or it is damaged.
        """
        path = self.built.folder / METADATA
        if not self.file.exists() or not path.exists():
            raise BackendError(f"{self.built.folder}: no {PLAN}; {self.advice}")
        try:
            description = read_json(path, links=False)
        except DocumentError as error:
            raise BackendError(f"{error}; build the plan again with `dq-export finish`") from error
        values: dict[str, Any] = description if isinstance(description, dict) else {}
        targets = values.get("targets")
        valid = isinstance(targets, list) and all(target in TARGETS for target in targets)
        if not valid or not all(isinstance(values.get(key), str) for key in ("library", "sha256")):
            raise BackendError(f"{shown_path(path)}: damaged; build the plan again with `dq-export finish`")
        return values

    def content(self) -> bytes:
        """The plan.

        Raises:
            BackendError: it is not what was built, or see `description`.
        """
        expected = self.description["sha256"]
        content = self.file.read_bytes()
        self._require(hashlib.sha256(content).hexdigest(), expected)
        return content

    def require_unchanged(self) -> None:
        """Check the plan without holding it in memory.

        Raises:
            BackendError: see `content`.
        """
        expected = self.description["sha256"]
        self._require(file_digest(self.file), expected)

    def _require(self, digest: str, expected: str) -> None:
        if digest != expected:
            raise BackendError(f"{self.file} was changed after the build; {self.advice}")

    def layers(self) -> Sequence[Layer]:
        """The builder's list of layers.

        Raises:
            BackendError: it is missing or damaged.
        """
        path = self.built.folder / LAYERS
        try:
            return read_layers(read_text(path, LAYERS_LIMIT, links=False))
        except (DocumentError, ValueError) as error:
            raise BackendError(f"{path}: not a builder's list of layers ({printable(str(error))})") from error
