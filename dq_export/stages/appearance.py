"""How the engine's pictures look beside PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dq_export.core.documents import shown_path
from dq_export.core.likeness import psnr, ssim
from dq_export.core.recipe import Recipe, RecipeError

from ..families.decoder import load_vae, pictures_of
from ..families.lpips import Lpips
from ..families.reference import Float32, Reference

COLOURS = (1, 3)
"""Channels of latents that are pictures."""


def appearance(reference: Reference, recipe: Recipe, references: Float32, latents: Float32) -> dict[str, Any]:
    """`psnr`, `ssim` and `lpips` of pictures; nothing of latents that nobody decodes.

    Args:
        references, latents: float32[N, C, H, W], what PyTorch and the engine sampled.

    Raises:
        ModelError: the weights of LPIPS or of the VAE are damaged.
    """
    pair = references, latents
    if references.shape[1] not in COLOURS:
        if recipe.metric_weights is None or not np.isfinite(latents).all():
            return {}
        vae = _vae(reference, recipe)
        pair = pictures_of(vae, references), pictures_of(vae, latents)
    exact, actual = (np.clip(pictures, -1, 1) for pictures in pair)
    if not np.isfinite(actual).all():
        return {"psnr": psnr(exact, actual)}
    distance = Lpips.load(Path(recipe.metric_weights))(exact, actual) if recipe.metric_weights else None
    return {"psnr": psnr(exact, actual), "ssim": ssim(exact, actual), "lpips": distance}


def require_appearance(reference: Reference, recipe: Recipe) -> None:
    """Look for the VAE that `--metric-weights` needs, before any work.

    Raises:
        ModelError: it is damaged.
        RecipeError: no VAE makes pictures of the latents.
    """
    if recipe.metric_weights is not None and reference.feed_shape[0] not in COLOURS:
        _vae(reference, recipe)


def _vae(reference: Reference, recipe: Recipe) -> Any:
    folder = reference.decoder
    vae = load_vae(folder, reference.feed_shape, recipe.variant or "") if folder else None
    if vae is None:
        reason = f"{shown_path(folder)} does not decode its latents" if folder else "its checkpoint has no VAE"
        raise RecipeError(f"metric_weights: pictures of this model cannot be compared, for {reason}; leave it out")
    return vae
