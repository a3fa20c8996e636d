"""The stage `reference`: what PyTorch draws, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_export.core.recipe import Recipe
from dq_export.deploy.replay import INPUTS, OUTPUTS

from ..finished_folder import REPLAY
from ..ledger import Result
from .calibrate import CALIBRATE
from .conditions import ENCODE
from .recording import PICTURES, record
from .stage import Context, Stage

USERS = frozenset({"verify", "bench"})
"""Stages that read the recorded calls."""


@dataclass(frozen=True)
class DrawReference(Stage[Result]):
    """Records network calls and pictures of PyTorch's network."""

    name: str = "reference"
    result: type[Result] = Result
    fields: tuple[str, ...] = ("parity_size", "steps", "seed", "guidance_scale", "sizes", "timesteps")
    needs: tuple[Stage[Any], ...] = (ENCODE,)
    network: bool = True

    def applies(self, context: Context) -> bool:
        """Where a later stage compares or times."""
        return bool(USERS.intersection(context.stages))

    def modules(self, recipe: Recipe) -> tuple[str, ...]:
        """What writes the recorded calls."""
        return ("polygraphy", "safetensors")

    def text(self, context: Context) -> str:
        """With the number of pictures."""
        return f"PyTorch draws {context.recipe.parity_size} pictures to compare with"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The calls, in polygraphy's files, and the pictures."""
        return tuple(f"{REPLAY}/{name}" for name in (INPUTS, OUTPUTS, PICTURES))

    def also(self, context: Context) -> dict[str, Any]:
        """The checkpoint, and the timestep bins, of each of which a call is recorded."""
        return {"model": context.reference.digest, "edges": context.results.of(CALIBRATE).edges}

    def run(self, context: Context, target: Path) -> Result:
        """Write `parity/`."""
        bins = context.results.of(CALIBRATE).bins
        with context.reference.on(context.device):
            record(context.reference, context.recipe, bins, target / REPLAY, context.progress.advance)
        return Result()


REFERENCE = DrawReference()
