"""Every backend that --format, --provider and --dtype can name."""

from __future__ import annotations

from dq_export.calibration.recipe import Recipe, RecipeError

from .backend import Backend
from .openvino import OpenVino
from .ort import ORT

BACKENDS: tuple[Backend, ...] = (ORT, OpenVino("fp32"), OpenVino("bf16"))


def backend_of(recipe: Recipe) -> Backend | None:
    """The backend of a recipe; None for format `onnx`, which builds nothing.

    Raises:
        RecipeError: no backend runs that format, provider and dtype together.
    """
    if recipe.format == "onnx":
        return None
    wanted = (recipe.format, recipe.provider, recipe.dtype)
    found = next((backend for backend in BACKENDS if (backend.name, backend.provider, backend.dtype) == wanted), None)
    if found is None:
        known = "; ".join(f"--provider {b.provider} --dtype {b.dtype}" for b in BACKENDS if b.name == recipe.format)
        raise RecipeError(
            f"--format {recipe.format} does not run --provider {recipe.provider} --dtype {recipe.dtype}; it runs {known}"
        )
    return found
