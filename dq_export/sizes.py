"""The sizes of pictures that an export is for, where it is for several."""

from __future__ import annotations

from dq_export.core.recipe import Recipe, RecipeError

from .families.reference import Reference


def require_sizes(recipe: Recipe, reference: Reference) -> None:
    """Let the network draw the recipe's first size, and try the others.

    Raises:
        ModelError: it does not draw one of them.
        RecipeError: several sizes for what takes one, or more than pictures.
    """
    if not recipe.pixels:
        return
    reference.draw_at(*recipe.pixels[0])
    if len(recipe.pixels) == 1:
        return
    if recipe.rounding == "distill":
        raise RecipeError(f"sizes {recipe.sizes}: rounding distill trains with pictures of one size; pass one, or rounding gptq")
    if recipe.calib_size < len(recipe.pixels):
        raise RecipeError(f"sizes {recipe.sizes}: more sizes than pictures, calib_size {recipe.calib_size}; raise it")
    timesteps = reference.timesteps(recipe.steps)
    for size in recipe.pixels[1:]:
        with reference.drawing(size):
            if reference.timesteps(recipe.steps) != timesteps:
                raise RecipeError(f"sizes {recipe.sizes}: the scheduler sends other timesteps at another size; pass one size")


def plan_shapes(recipe: Recipe, reference: Reference) -> dict[str, str]:
    """The recipe's shapes of a plan: those from the least to the greatest of several sizes, where it names none itself."""
    from dq_export.deploy.tensorrt.profiles import BATCHES

    if not recipe.plan or len(recipe.pixels) < 2 or recipe.min_shapes or recipe.opt_shapes or recipe.max_shapes:
        return {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for size in (*recipe.pixels, *(_corners(recipe) if recipe.triton else ())):
        with reference.at(size):
            for item in reference.inputs:
                shapes.setdefault(item.name, []).append(item.zeros(1).shape)
    batched = {item.name for item in reference.inputs if item.batched}
    flags: dict[str, list[str]] = {"min_shapes": [], "opt_shapes": [], "max_shapes": []}
    for name, of_sizes in shapes.items():
        if len(set(of_sizes)) == 1:
            continue
        columns = list(zip(*of_sizes, strict=True))
        triples = ([min(column) for column in columns], [column[0] for column in columns], [max(column) for column in columns])
        for key, batch, shape in zip(flags, BATCHES, triples, strict=True):
            numbers = [batch, *shape[1:]] if name in batched else shape
            flags[key].append(f"{name}:{'x'.join(map(str, numbers))}")
    return {key: ",".join(texts) for key, texts in flags.items()}


def _corners(recipe: Recipe) -> tuple[tuple[int, int], tuple[int, int]]:
    """The least and the greatest size that a server draws: its requests choose height and width apart from each other."""
    heights, widths = zip(*recipe.pixels, strict=True)
    return (min(heights), min(widths)), (max(heights), max(widths))
