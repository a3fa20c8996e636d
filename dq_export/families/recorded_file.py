"""Files that a recipe names: their paths, and the check that they did not change since they were recorded."""

from __future__ import annotations

import os
from pathlib import Path

from dq_export.core.digest import file_digest
from dq_export.core.documents import printable, shown, shown_path
from dq_export.core.recipe import Recipe, RecipeError

from .metric_weights import require_metrics


def settle_tables(recipe: Recipe) -> Recipe:
    """The recipe with the path and digest of its file of tables.

    Raises:
        RecipeError: the file is missing, or has changed since it was recorded.
    """
    if recipe.tables is None:
        if recipe.tables_sha256 is not None:
            raise RecipeError("tables_sha256: it is of a file, and tables names none; add tables, or leave it out")
        return recipe
    path = place_of("tables", recipe.tables)
    digest = require_recorded("tables", path, recipe.tables_sha256)
    return recipe.model_copy(update={"tables": str(path), "tables_sha256": digest})


def settle_metrics(recipe: Recipe) -> Recipe:
    """The recipe with the absolute place of its folder of metrics' weights.

    Raises:
        ModelError: see `require_metrics`.
    """
    if recipe.metric_weights is None:
        return recipe
    folder = Path(os.path.expanduser(recipe.metric_weights)).absolute()
    require_metrics(folder)
    return recipe.model_copy(update={"metric_weights": str(folder)})


def place_of(key: str, text: str) -> Path:
    """The absolute path of a regular file.

    Raises:
        RecipeError: the file does not exist.
    """
    path = Path(os.path.expanduser(text)).absolute()
    if not path.is_file():
        problem = "not a regular file" if os.path.lexists(path) else "no such file"
        raise RecipeError(f"{key} {shown_path(path)}: {problem}")
    return path


def require_recorded(key: str, path: Path, recorded: str | None) -> str:
    """The sha256 of a file, hexadecimal.

    Args:
        recorded: the expected digest; None to accept any.

    Raises:
        RecipeError: the digest differs, or the file cannot be read.
    """
    try:
        digest = file_digest(path)
    except OSError as error:
        raise RecipeError(f"{key} {shown_path(path)}: cannot be read ({error.strerror})") from error
    if recorded not in (None, digest):
        raise RecipeError(
            f"{key} {shown_path(path)}: its sha256 is {digest}, and the recipe has {printable(str(recorded))}; put the "
            f"recipe's file back, or pass the new one with --{key} {shown(str(path), 200)}"
        )
    return digest
