"""The prompts or the file of conditions of a run, determined before any work."""

from __future__ import annotations

import os
from pathlib import Path

from dq_export.core.condition_file import load_conditions
from dq_export.core.documents import DocumentError
from dq_export.core.network import Conditions
from dq_export.core.prompts import read_prompts
from dq_export.core.recipe import Recipe, RecipeError

from .checkpoint import PROMPTS, Checkpoint
from .family import Family
from .recorded_file import require_recorded

PACKAGED = Path(__file__).parent.parent / "models" / PROMPTS


def settle(recipe: Recipe, family: Family, checkpoint: Checkpoint) -> Recipe:
    """The recipe with its prompts as texts, or with the path and digest of its conditions; unchanged for other families.

    Raises:
        RecipeError: the recipe has both, the network draws neither, or a file is missing, damaged, or changed since it was
            recorded.
    """
    keys = [key for key in ("prompts", "conditions", "conditions_sha256") if getattr(recipe, key) is not None]
    if keys and not family.encoders:
        raise RecipeError(f"{keys[0]}: family {family.name} draws no text; leave it out")
    if "prompts" in keys and "conditions" in keys:
        raise RecipeError("prompts and conditions: give one of them; conditions are prompts that are encoded already")
    if keys == ["conditions_sha256"]:
        raise RecipeError("conditions_sha256: it is of a file, and conditions names none; add conditions, or leave it out")
    if not family.encoders:
        return recipe
    if recipe.conditions is not None:
        path = Path(os.path.expanduser(recipe.conditions)).absolute()
        conditions_of(path)  # for its errors; a missing file is one of them
        digest = require_recorded("conditions", path, recipe.conditions_sha256)
        return recipe.model_copy(update={"conditions": str(path), "conditions_sha256": digest})
    if recipe.prompts is not None:
        return recipe
    beside = checkpoint.home / PROMPTS
    return recipe.model_copy(update={"prompts": prompts_of(beside if os.path.lexists(beside) else PACKAGED)})


def prompts_of(path: Path) -> tuple[str, ...]:
    """The prompts of a file.

    Raises:
        RecipeError: see `read_prompts`.
    """
    try:
        return read_prompts(path)
    except DocumentError as error:
        raise RecipeError(f"prompts {error}") from error


def conditions_of(path: Path) -> Conditions:
    """The conditions of a file.

    Raises:
        RecipeError: see `load_conditions`.
    """
    try:
        return load_conditions(path)
    except DocumentError as error:
        raise RecipeError(f"conditions {error}") from error
