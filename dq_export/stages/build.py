"""The stage `build`: the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..finished_folder import ENGINE, MODEL
from ..heap import large_blocks_mapped
from ..ledger import Result
from ..machine import installed
from .quantize import QUANTIZE
from .stage import Context, Stage


@dataclass(frozen=True)
class Build(Stage[Result]):
    """Lets the backend build its engine."""

    name: str = "build"
    result: type[Result] = Result
    fields: tuple[str, ...] = ("format", "provider", "dtype", "target", "min_shapes", "opt_shapes", "max_shapes")
    needs: tuple[Stage[Any], ...] = (QUANTIZE,)

    def applies(self, context: Context) -> bool:
        """Where the format has an engine."""
        return context.backend is not None

    def text(self, context: Context) -> str:
        """With what it is built for, and the time that it will take."""
        recipe = context.recipe
        return f"engine for {' '.join(filter(None, (recipe.format, recipe.provider, recipe.dtype)))}{context.duration}"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The backend's folder."""
        return (ENGINE,)

    def also(self, context: Context) -> dict[str, Any]:
        """The versions of what builds."""
        return {"tools": installed(context.backend.packages) if context.backend else {}}

    def run(self, context: Context, target: Path) -> Result:
        """Write `engine/`.

        Raises:
            NotHereError: another machine must build it.
        """
        assert context.backend is not None  # see `applies`
        with large_blocks_mapped():
            built = context.backend.build(context.folder / MODEL, target / ENGINE, context.progress.advance)
        return Result(summary=built.note)


BUILD = Build()
