"""The stage `float`: the network as a float ONNX graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_export.core.network import axes_of
from dq_export.core.recipe import Recipe

from ..finished_folder import FLOAT_CONFIG
from ..ledger import Result
from .stage import Context, Stage, folder_bytes


@dataclass(frozen=True)
class FloatGraph(Stage[Result]):
    """Exports the network with PyTorch's exporter."""

    name: str = "float"
    result: type[Result] = Result
    fields: tuple[str, ...] = ("timesteps", "sizes")
    network: bool = True

    def modules(self, recipe: Recipe) -> tuple[str, ...]:
        """PyTorch, the exporter, and what writes the report."""
        return ("torch", "diffusers", "onnx", "onnxscript", "jinja2")

    def text(self, context: Context) -> str:
        """With the time that it will take."""
        return f"PyTorch to ONNX{context.duration}"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The folder of the graph and its weights."""
        return ("float",)

    def also(self, context: Context) -> dict[str, Any]:
        """The checkpoint, and the sizes that the graph holds as examples, of which the conditions decide some."""
        sizes = {axis.name: axis.size for axis in axes_of(context.reference.inputs)}
        return {"model": context.reference.digest, "config": context.reference.config, "sizes": sizes}

    def run(self, context: Context, target: Path) -> Result:
        """Write `float/model.onnx`, and the network's configuration beside it."""
        folder = target / "float"
        folder.mkdir()
        context.reference.export_onnx(folder / "model.onnx", shared=context.shared)
        (target / FLOAT_CONFIG).write_text(json.dumps(context.reference.config, indent=1, sort_keys=True) + "\n")
        return Result(summary=f"{folder_bytes(folder) / 1e6:.1f} MB")


FLOAT = FloatGraph()
