"""What a stage of the export is, and what the stages of one run share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from dq_export.calibration.group import ProcessGroup
from dq_export.calibration.plugin import WeightPlugin
from dq_export.calibration.tables import Tables
from dq_export.core.progress import Progress
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule
from dq_export.deploy.backend import Backend

from ..families.reference import Reference
from ..ledger import Ledger, R, Result

if TYPE_CHECKING:
    from ..families.source import Source

SPEED = 6.5e8
"""Bytes of float32 weights a second that the export to ONNX and the build of an engine take; measured on two cores."""


@dataclass(frozen=True)
class Stage(ABC, Generic[R]):
    """One stage: what it writes, what that depends on, and the work.

    Args:
        name: on the progress line, in the ledger and in the report.
        result: the type of what `run` returns.
        fields: of the recipe, that decide what the stage writes.
        needs: stages whose outputs it reads. It runs again when they change; one that this run does not have is passed over.
        network: whether it calls PyTorch's network, whose weights are freed when no later stage does.
    """

    name: str
    result: type[R]
    fields: tuple[str, ...] = ()
    needs: tuple[Stage[Any], ...] = ()
    network: bool = False

    def applies(self, context: Context) -> bool:
        """Whether this run has the stage at all."""
        return True

    def modules(self, recipe: Recipe) -> tuple[str, ...]:
        """Modules that it imports, in addition to those that its backend requires."""
        return ()

    @abstractmethod
    def text(self, context: Context) -> str:
        """What it does, for the progress line."""

    def outputs(self, context: Context) -> tuple[str, ...]:
        """Files and folders that it writes, by path in the output folder."""
        return ()

    def also(self, context: Context) -> dict[str, Any]:
        """JSON values that decide what it writes, in addition to `fields` and `needs`."""
        return {}

    def inputs(self, context: Context) -> dict[str, Any]:
        """Everything that decides what it writes, JSON values."""
        return {
            "recipe": context.recipe.model_dump(mode="json", include=set(self.fields)),
            "stages": {stage.name: context.ledger.digest(stage.name) for stage in self.needs if stage in context.results},
            **self.also(context),
        }

    @abstractmethod
    def run(self, context: Context, target: Path) -> R:
        """Write the outputs into `target`, from where they are moved into the output folder."""

    def reuse(self, context: Context) -> None:
        """Called in place of `run` where an earlier run did the same work."""


class Results:
    """What the stages of a run returned."""

    def __init__(self) -> None:
        self.unbuilt = ""
        """Why another machine must build the engine; empty if none must."""
        self._by_name: dict[str, Result] = {}

    def __contains__(self, stage: Stage[Any]) -> bool:
        return stage.name in self._by_name

    def add(self, stage: Stage[R], result: R) -> None:
        """Note what a stage returned."""
        self._by_name[stage.name] = result

    def get(self, stage: Stage[R]) -> R | None:
        """What a stage returned; None where the run has not done it."""
        result = self._by_name.get(stage.name)
        return result if isinstance(result, stage.result) else None

    def of(self, stage: Stage[R]) -> R:
        """What a stage that was done before returned.

        Raises:
            KeyError: it was not: the order of the stages is wrong.
        """
        result = self.get(stage)
        if result is None:
            raise KeyError(stage.name)
        return result

    def seconds(self) -> dict[str, float]:
        """By stage, of the run that did the work."""
        return {name: result.seconds for name, result in self._by_name.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """An export that was checked before its work.

    Args:
        recipe: resolved: every value is there that depends on the model or the backend.
        source: where the model was found.
        assigned: the completed rule of each linear.
        tables: what a file decides, and not calibration.
        stages: names of the stages that run.
        space: bytes of second moments, for the calibration.
        undecoded: why no VAE makes pictures of the latents; empty if the checkpoint's does.
        weight_bytes: of the float32 weights of all linears.
    """

    recipe: Recipe
    source: Source
    reference: Reference
    backend: Backend | None
    assigned: Mapping[str, Rule]
    tables: Tables
    stages: tuple[str, ...]
    space: int
    undecoded: str
    weight_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Context(Prepared):
    """One export at work.

    Args:
        folder: the output folder, in which the outputs of finished stages lie.
        device: where PyTorch computes.
        results: of the stages that are done; the only part that changes.
    """

    folder: Path
    ledger: Ledger
    progress: Progress
    group: ProcessGroup
    device: str
    plugin: WeightPlugin
    results: Results = field(default_factory=Results)

    @property
    def shared(self) -> bool:
        """Whether a batch shares one timestep."""
        return self.recipe.timesteps == "shared"

    @property
    def schemes(self) -> dict[str, str]:
        """What the rules decide for each linear."""
        return {name: str(rule.scheme) for name, rule in self.assigned.items()}

    @property
    def duration(self) -> str:
        """How long the export to ONNX or a build will take, which report no progress; empty below two seconds."""
        return f", about {self.weight_bytes / SPEED:.0f} s" if self.weight_bytes > 2 * SPEED else ""


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
