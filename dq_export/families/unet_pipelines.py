"""diffusers' pipelines of UNets: which one draws with a network, and what it starts from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from .reference import Float32
from .starting_pictures import generators_of, random_masks, random_pictures

PLAIN, XL, LCM = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"
INPAINT, XL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"
ENCODED_AS = {PLAIN: PLAIN, LCM: PLAIN, INPAINT: PLAIN, XL: XL, XL_INPAINT: XL}
"""Classes of pipelines, and for each one the class that encodes prompts in the same way."""
FIRST, SECOND = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")
PARTS = {PLAIN: FIRST, XL: FIRST + SECOND}
OPTIONAL = dict.fromkeys((PLAIN, LCM, INPAINT), SECOND)
"""Parts that pipelines may leave out."""
ALONE: dict[str, dict[str, Any]] = {
    PLAIN: {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    XL: {"add_watermarker": False},
}
"""Arguments that make a pipeline draw latents alone."""
PIXELS = 8
"""Pixels of one latent along an axis. Source: the pipelines' `vae_scale_factor` without a VAE."""
WITHOUT_VAE = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
"""Replaces a VAE where a pipeline asks one for its channels, of which these pipelines take four."""


def drawn_by(config: Any) -> str:
    """The class of the pipeline that draws with a network of this configuration."""
    if config.in_channels > config.out_channels:
        return INPAINT if config.addition_embed_type is None else XL_INPAINT
    return PLAIN if config.addition_embed_type is None else XL


def constructed(name: str) -> dict[str, Any]:
    """The arguments with which a pipeline of a class draws latents alone, from encoded prompts."""
    kind = ENCODED_AS[name]
    return {**dict.fromkeys(PARTS[kind]), **ALONE[kind]}


def start(name: str, noise: Float32) -> dict[str, Any]:
    """What a pipeline of a class starts from beside the noise, as arguments of its call.

    A pipeline that inpaints gets a random picture and a random mask.

    Args:
        noise: float32[P, C, h, w].
    """
    import torch

    shape = noise.shape[1:]
    height, width = (PIXELS * size for size in shape[1:])
    sizes = {"height": height, "width": width, "generator": torch.Generator().manual_seed(0)}
    if name not in (INPAINT, XL_INPAINT):
        return sizes
    generators = generators_of(noise)
    pictures, masks = random_pictures(shape, generators), random_masks(shape, generators)
    # The latents of the grey that pipelines put into the mask are near zero.
    return {**sizes, "image": pictures, "mask_image": masks, "masked_image_latents": pictures * (1 - masks), "strength": 1.0}
