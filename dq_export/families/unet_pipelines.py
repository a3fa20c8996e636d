"""diffusers' pipelines of UNets: which one draws with a network, and what it starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from dq_export.core.network import Feed

from .family import Pictures
from .pipelines import latents_of, pipeline_of
from .reference import Float32
from .sampling import set_steps
from .stand_in import StandIn
from .starting_pictures import generators_of, outlines, random_masks, random_pictures
from .unet_values import is_refiner

PLAIN, XL, LCM = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"
INPAINT, XL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"
REFINER = "StableDiffusionXLImg2ImgPipeline"
CONTROLLED = {PLAIN: "StableDiffusionControlNetPipeline", XL: "StableDiffusionXLControlNetPipeline"}
"""For the classes of `drawn_by`, those that draw with a ControlNet."""
ENCODED_AS = {
    **{PLAIN: PLAIN, LCM: PLAIN, INPAINT: PLAIN, CONTROLLED[PLAIN]: PLAIN},
    **{XL: XL, XL_INPAINT: XL, REFINER: XL, CONTROLLED[XL]: XL},
}
"""Classes of pipelines, and for each one the class that encodes prompts in the same way."""
FIRST, SECOND = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")
PARTS = {PLAIN: FIRST, XL: FIRST + SECOND}
OPTIONAL = {**dict.fromkeys((PLAIN, LCM, INPAINT, CONTROLLED[PLAIN]), SECOND), REFINER: FIRST}
"""Parts that pipelines may leave out."""
ALONE: dict[str, dict[str, Any]] = {
    PLAIN: {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    XL: {"add_watermarker": False},
}
"""Arguments that make a pipeline draw latents alone."""
PIXELS = 8
"""Pixels of one latent along an axis. Source: the pipelines' `vae_scale_factor` without a VAE."""
STRENGTH = 0.3
"""The share of a schedule that the refiner's pipeline samples, the last steps. Source: its default."""
WITHOUT_VAE = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
"""Replaces a VAE where a pipeline asks one for its channels, of which these pipelines take four."""


def drawn_by(config: Any) -> str:
    """The class of the pipeline that draws with a network of this configuration."""
    if is_refiner(config):
        return REFINER
    if config.in_channels > config.out_channels:
        return INPAINT if config.addition_embed_type is None else XL_INPAINT
    return PLAIN if config.addition_embed_type is None else XL


def task(config: Any) -> str:
    """What the hub calls the task of the pipeline that draws with a network of this configuration."""
    return "image-to-image" if drawn_by(config) in (INPAINT, XL_INPAINT, REFINER) else "text-to-image"


def encoding(name: str, parts: Mapping[str, Any]) -> Any:
    """A pipeline that encodes prompts as that of a class does.

    Args:
        parts: tokenizers and text encoders; the refiner has the second two alone.
    """
    kind = ENCODED_AS[name]
    encoders = {part: parts.get(part) for part in PARTS[kind]}
    return pipeline_of(kind, **encoders, **ALONE[kind], unet=None, scheduler=None)


def draw(network: StandIn, scheduler: Any, pictures: Pictures, prompts: Feed, *, steps: int, guidance: float) -> Float32:
    """The latents that a network's own pipeline samples in a number of calls, float32 of the shape of the noise.

    Args:
        prompts: arrays by the names of the pipeline's arguments.
    """
    name, noise, beside = drawn_by(network.config), pictures.noise, {}
    if pictures.controlnet is not None:
        name, beside = CONTROLLED[name], {"controlnet": pictures.controlnet}
    whole = math.ceil(steps / STRENGTH) if name == REFINER else steps
    set_steps(scheduler, whole)
    kind, score = ENCODED_AS[name], {"requires_aesthetics_score": True} if name == REFINER else {}
    parts = {**dict.fromkeys(PARTS[kind]), **ALONE[kind], **score, **beside}
    pipeline = pipeline_of(name, **parts, unet=network, scheduler=scheduler)
    pipeline.vae = WITHOUT_VAE
    settings = {"num_inference_steps": whole, "guidance_scale": guidance, **_start(name, noise)}
    return latents_of(pipeline, None if name == REFINER else noise, prompts, **settings)


def _start(name: str, noise: Float32) -> dict[str, Any]:
    """What a pipeline of a class starts from beside the noise, as arguments of its call.

    A pipeline that inpaints gets random pictures and masks, and the refiner's gets random pictures, to which it adds noise. One
    with a ControlNet gets the outlines of random shapes.

    Args:
        noise: float32[P, C, h, w].
    """
    import torch

    shape, generators = noise.shape[1:], generators_of(noise)
    if name == REFINER:
        return {"image": random_pictures(shape, generators), "strength": STRENGTH, "generator": generators}
    height, width = (PIXELS * size for size in shape[1:])
    sizes = {"height": height, "width": width, "generator": torch.Generator().manual_seed(0)}
    if name in CONTROLLED.values():
        return {**sizes, "image": outlines(height, width, generators)}
    if name not in (INPAINT, XL_INPAINT):
        return sizes
    pictures, masks = random_pictures(shape, generators), random_masks(shape, generators)
    # The latents of the grey that pipelines put into the mask are near zero.
    return {**sizes, "image": pictures, "mask_image": masks, "masked_image_latents": pictures * (1 - masks), "strength": 1.0}
