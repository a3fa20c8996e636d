"""The stage `conditions`: prompts encoded once, or conditions that a file holds, for all stages that draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_export.core.condition_file import CONDITIONS, load_conditions, save_conditions
from dq_export.core.documents import DocumentError
from dq_export.core.progress import Advance
from dq_export.core.recipe import Recipe

from ..families.prompts import conditions_of
from ..families.reference import Reference
from ..ledger import Result
from ..output_folder import OutputError
from .stage import Context, Stage


@dataclass(frozen=True)
class EncodePrompts(Stage[Result]):
    """Writes what the pictures are drawn of, and gives it to the network."""

    name: str = "conditions"
    result: type[Result] = Result
    fields: tuple[str, ...] = ("prompts", "conditions_sha256")
    network: bool = True  # it does not call the network, but later stages do

    def applies(self, context: Context) -> bool:
        """Where the network draws prompts."""
        return draws_prompts(context.recipe)

    def modules(self, recipe: Recipe) -> tuple[str, ...]:
        """What encodes prompts."""
        return ENCODING if recipe.prompts is not None else ()

    def text(self, context: Context) -> str:
        """How many prompts, or of which file."""
        prompts = context.recipe.prompts
        return f"of {context.recipe.conditions}" if prompts is None else f"{len(prompts)} prompts through the text encoder"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The file."""
        return (CONDITIONS,)

    def also(self, context: Context) -> dict[str, Any]:
        """The files that encode."""
        return {"files": [] if context.recipe.prompts is None else context.reference.encoding_files()}

    def run(self, context: Context, target: Path) -> Result:
        """Write `conditions.safetensors`."""
        write_conditions(context.reference, context.recipe, target / CONDITIONS, context.device, context.progress.advance)
        set_conditions(context.reference, target / CONDITIONS)
        return Result(summary=f"{len(context.reference.conditions)} conditions")

    def reuse(self, context: Context) -> None:
        """Give the network what is there."""
        set_conditions(context.reference, context.folder / CONDITIONS)


ENCODE = EncodePrompts()
ENCODING = ("transformers", "tokenizers", "sentencepiece", "safetensors")
"""Modules that load tokenizers and text encoders."""


def draws_prompts(recipe: Recipe) -> bool:
    """Whether a resolved recipe is of a network that draws prompts."""
    return recipe.prompts is not None or recipe.conditions is not None


def write_conditions(reference: Reference, recipe: Recipe, path: Path, device: str, progress: Advance) -> None:
    """Encode a resolved recipe's prompts, or read its file, and write what the network is to draw to `path`.

    Raises:
        ModelError: see `Reference.encode`.
        RecipeError: the file of conditions is gone or damaged.
    """
    if recipe.prompts is not None:
        conditions = reference.encode(recipe.prompts, device, progress)
    else:
        conditions = conditions_of(Path(recipe.conditions or ""))
    save_conditions(path, conditions)


def set_conditions(reference: Reference, path: Path) -> None:
    """Give a network the conditions that `write_conditions` wrote.

    Raises:
        OutputError: the file is gone or damaged.
    """
    try:
        reference.conditions = load_conditions(path)
    except DocumentError as error:
        raise OutputError(f"{error}; delete it and run the same command again") from error
