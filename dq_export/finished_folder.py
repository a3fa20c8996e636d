"""A finished export's folder. Its content is not trusted: somebody else may have made it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from pydantic import ValidationError

from dq_export.core.documents import DocumentError, printable, read_json, shown, shown_path
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.rule import Rule
from dq_export.deploy.backend import Built, Feed, Float32
from dq_export.deploy.replay import INPUTS, OUTPUTS, load_replay
from dq_export.passes.match import linears

from .ledger import RECIPE
from .output_folder import OutputError, require_plain
from .report.report import Report

REPORT, MODEL, ENGINE, REPLAY = "report.json", "model.onnx", "engine", "parity"
FLOAT_CONFIG = "float/config.json"
"""The configuration of the network, from which `load` makes what a diffusers pipeline asks its denoiser."""
REPORT_LIMIT = 64 << 20
"""Bytes. The report of DiT-XL/2, 282 linears at 50 timesteps, has 300,000."""


@dataclass(frozen=True)
class FinishedFolder:
    """What an export left in `path`; see `open`."""

    path: Path

    @staticmethod
    def open(path: Path, *required: str) -> FinishedFolder:
        """The folder, which holds no link and no special file.

        Args:
            required: files that it must hold.

        Raises:
            OutputError: it does not, or it is not a folder.
        """
        if not os.path.isdir(path):  # which, unlike Path.is_dir, takes any name
            raise OutputError(f"{shown_path(path)}: no such folder; is it the output folder of a finished export?")
        require_plain(path)
        missing = [name for name in required if not (path / name).is_file()]
        if missing:
            raise OutputError(f"{shown_path(path)}: no {', '.join(missing)}; is it the output folder of a finished export?")
        return FinishedFolder(path)

    def recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            RecipeError: not one that an export writes.
        """
        recipe = Recipe.load(self.path / RECIPE)
        if not recipe.rules:
            raise RecipeError(
                f"recipe {shown_path(self.path / RECIPE)}: without rules, as no export writes it; was it cut short? Export again"
            )
        return recipe

    def report(self) -> Report:
        """The report.

        Raises:
            OutputError: not one that this version writes.
        """
        path = self.path / REPORT
        try:
            return Report.model_validate(read_json(path, REPORT_LIMIT, links=False))
        except DocumentError as error:
            raise OutputError(f"{error}; export again") from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = printable(".".join(map(str, first["loc"])), 80)
            raise OutputError(
                f"{shown_path(path)}: not a report of this version of dq-export ({key}: {first['msg']}); export again"
            ) from error

    def graph(self) -> ir.Model:
        """The quantized graph.

        Raises:
            OutputError: it is damaged.
        """
        from google.protobuf.message import DecodeError

        try:
            return ir.load(self.path / MODEL)
        except (DecodeError, ir.serde.SerdeError, ValueError, OSError) as error:
            raise OutputError(f"{shown_path(self.path / MODEL)}: not a readable ONNX file ({printable(str(error))})") from error

    def assigned(self) -> dict[str, Rule]:
        """The rule of every linear, as the report has it.

        Raises:
            OutputError: the graph or the report is damaged, or the report is of another graph.
        """
        assigned = {linear.name: linear.decided for linear in self.report().linears}
        unknown = [name for name in linears(self.graph()) if name not in assigned]
        if unknown:
            raise OutputError(f"{shown_path(self.path / REPORT)}: no linear {shown(unknown[0])}, which {MODEL} has; export again")
        return assigned

    def calls(self) -> tuple[list[Feed], list[Float32]]:
        """The recorded network calls: inputs, and what PyTorch put out.

        Raises:
            OutputError: there are none, or they are damaged.
        """
        missing = [name for name in (INPUTS, OUTPUTS) if not (self.path / REPLAY / name).is_file()]
        if missing:
            raise OutputError(
                f"{shown_path(self.path)}: no {REPLAY}/{missing[0]}, nothing to compare with; run the whole export again"
            )
        try:
            return load_replay(self.path / REPLAY)
        except DocumentError as error:
            raise OutputError(f"{error}; damaged, so export again") from error


def engine_of(out: Path) -> Built:
    """The engine that an export built into its folder."""
    return Built(model=out / MODEL, folder=out / ENGINE)


def portable_name(recipe: Recipe) -> str:
    """The graph that ONNX Runtime's CPU provider can run, from the output folder: it has no bfloat16."""
    return f"{REPLAY}/model.onnx" if recipe.plan and recipe.dtype == "bf16" else MODEL
