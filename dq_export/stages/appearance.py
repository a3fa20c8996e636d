"""The pictures of what PyTorch and the engine sampled, and how far apart they look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dq_export.core.likeness import psnr, ssim
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe, RecipeError

from ..families.clip_score import FOLDER, ClipScore
from ..families.decoder import decoding_bytes, load_vae, pictures_of, undecodable
from ..families.lpips import Lpips
from ..families.metric_weights import has_clip, has_lpips
from ..families.reference import Float32, Reference
from ..heap import return_freed_memory
from ..memory import BASE, GIB

Pair = tuple[Float32, Float32]
COLOURS = (1, 3)
"""Channels of latents that are pictures."""
SHOWN = 4
"""Pictures of decoded latents in the report: decoding one takes as long as a few calls of the network."""


def undecoded(reference: Reference, recipe: Recipe, limit: float | None) -> str:
    """Why no VAE makes pictures of the network's latents; empty if the checkpoint's does.

    Args:
        limit: GiB that this process may take; None: any.

    Raises:
        ModelError: the VAE's configuration or one of its files is damaged.
    """
    if reference.decoder is None:
        return "its checkpoint has no VAE"
    shape, variant = latent_shape(reference), recipe.variant or ""
    reason = undecodable(reference.decoder, shape, variant)
    if reason or limit is None:
        return reason
    needed = BASE + decoding_bytes(reference.decoder, shape, variant) / GIB
    return f"its VAE takes {needed:.1f} GiB to decode, and --max-memory is {limit:g}" if needed > limit else ""


def latent_shape(reference: Reference) -> tuple[int, ...]:
    """(C, h, w) of latents as a VAE takes them."""
    return reference.latents(np.zeros((1, *reference.feed_shape), dtype=np.float32)).shape[1:]


def draws_pictures(reference: Reference, reason: str) -> bool:
    """Whether there are pictures: a VAE decodes latents, or they have the channels of pictures.

    Args:
        reason: see `undecoded`.
    """
    return not reason or latent_shape(reference)[0] in COLOURS


def origin(reference: Reference, reason: str, count: int) -> str:
    """One sentence: what made the pictures in the report, or why there are none.

    Args:
        reason: see `undecoded`.
        count: of the pictures that are compared.
    """
    if reason:
        end = "the latents are drawn" if draws_pictures(reference, reason) else "no pictures are drawn"
        return f"{reason[0].upper()}{reason[1:]}, so {end}."
    return f"The checkpoint's VAE decoded these pictures, the first {min(SHOWN, count)} of {count}."


def decoded(reference: Reference, recipe: Recipe, pair: Pair, progress: Advance = unwatched) -> Pair:
    """Pictures float32[P, 3, H, W] in [-1, 1] of what PyTorch and the engine sampled.

    All of them where `--metric-weights` compares them, else the first SHOWN. The VAE is in memory only here.

    Args:
        pair: float32[N, ...] each, as `Reference.draw` returns them.
        progress: see `pictures_of`.

    Raises:
        ModelError: the VAE is damaged.
    """
    assert reference.decoder is not None  # see `undecoded`
    return_freed_memory()
    count = len(pair[0]) if recipe.metric_weights else min(SHOWN, len(pair[0]))
    latents = [reference.latents(sampled[:count]) for sampled in pair]
    vae = load_vae(reference.decoder, latents[0].shape[1:], recipe.variant or "")
    pictures = np.clip(pictures_of(vae, np.concatenate(latents), progress), -1, 1)
    return pictures[:count], pictures[count:]


def appearance(recipe: Recipe, references: Float32, pictures: Float32, prompts: Sequence[str]) -> dict[str, Any]:
    """`psnr`, `ssim` and `lpips` of the engine's pictures beside PyTorch's, and the CLIP scores of both.

    Args:
        references, pictures: float32[N, C, H, W].
        prompts: of the pictures; none where there are none.

    Raises:
        ModelError: the weights of a metric are damaged.
    """
    exact, actual = (np.clip(values, -1, 1) for values in (references, pictures))
    if not np.isfinite(actual).all():
        return {"psnr": psnr(exact, actual)}
    looks: dict[str, Any] = {"psnr": psnr(exact, actual), "ssim": ssim(exact, actual)}
    folder = None if recipe.metric_weights is None else Path(recipe.metric_weights)
    if folder is not None and has_lpips(folder):
        looks["lpips"] = Lpips.load(folder)(exact, actual)
    if folder is not None and has_clip(folder) and prompts:
        score = ClipScore.load(folder / FOLDER)
        looks |= {"clip": score(actual, prompts), "clip_of_pytorch": score(exact, prompts)}
    return looks


def require_appearance(reference: Reference, recipe: Recipe, limit: float | None) -> str:
    """Ask for the pictures that `--metric-weights` needs, before any work. See `undecoded`.

    Raises:
        ModelError: see `undecoded`.
        RecipeError: there are none.
    """
    reason = undecoded(reference, recipe, limit)
    if recipe.metric_weights is not None and not draws_pictures(reference, reason):
        raise RecipeError(f"metric_weights: pictures of this model cannot be compared, for {reason}; leave it out")
    return reason
