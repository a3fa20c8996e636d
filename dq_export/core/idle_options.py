"""Options that change nothing beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .recipe import FORMATS, METHODS, Recipe, RecipeError

TRAINING_FIELDS = (*(name for name in Recipe.model_fields if name.startswith("distill_")), "finish")
"""The recipe's fields that only training reads."""
SHAPES = ("min_shapes", "opt_shapes", "max_shapes")


def _runs_plan(recipe: Recipe, *plans: str) -> bool:
    """Whether the engine is such a plan, or a plug-in's, which may read any field."""
    return recipe.plan in plans or recipe.format not in FORMATS.built_in


USES: dict[str, tuple[str, Callable[[Recipe], bool]]] = {
    "percentile": ("--method percentile", lambda recipe: recipe.method not in {*METHODS.built_in} - {"percentile"}),
    "alpha": ("--scaling smooth", lambda recipe: recipe.scaling == "smooth"),
    "rho": ("--scaling dilate", lambda recipe: recipe.scaling == "dilate"),
    **dict.fromkeys(TRAINING_FIELDS, ("--rounding distill", lambda recipe: recipe.rounding == "distill")),
    "target": ("a plan of TensorRT-RTX, as of --format trt-rtx", lambda recipe: _runs_plan(recipe, "trt-rtx")),
    **dict.fromkeys(SHAPES, ("a plan, as of --format trt", lambda recipe: _runs_plan(recipe, "trt", "trt-rtx"))),
    "max_lpips": ("--metric-weights FOLDER", lambda recipe: recipe.metric_weights is not None),
}
"""By field of the recipe: the option that uses it, and whether a recipe has that. Plug-ins may use what they like."""


def require_used(recipe: Recipe, fields: Iterable[str]) -> None:
    """Check that each option that a user passes has an effect.

    Args:
        fields: the recipe's fields that come from flags or arguments. Those of a file are not checked: every export writes all
            fields into its recipe, and a flag may then turn off what uses them.

    Raises:
        RecipeError: one has none.
    """
    for name in fields:
        user, uses = USES.get(name, ("", None))
        if uses is not None and not uses(recipe):
            flag = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{flag} has no effect without {user}; pass that, too, or leave out {flag}")
