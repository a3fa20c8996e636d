"""Tiny Stable Diffusion pipelines: that of 1 and 2, and XL's, whose network is called with the pooled text and sizes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from json_file import edit
from sd3 import save_clip
from toy import PROMPTS

from dq_export.core.network import Feed, Float32
from dq_export.families.reference import Reference
from dq_export.families.starting_pictures import generators_of, outlines

CLIP = 32
"""Width of a CLIP encoder."""
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": CLIP,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
XL: dict[str, Any] = {
    "cross_attention_dim": 2 * CLIP,
    "transformer_layers_per_block": (2, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + CLIP,
}
"""What makes a network of it one of Stable Diffusion XL."""
INPAINT: dict[str, Any] = {"task": "Inpaint", "in_channels": 9}
"""What makes a pipeline of it one that inpaints."""
REFINER: dict[str, Any] = {
    **XL,
    "task": "Img2Img",
    "cross_attention_dim": CLIP,
    "projection_class_embeddings_input_dim": 5 * 4 + CLIP,
}
"""The same for XL's refiner, which has one text encoder, the second."""
SCALE = 16
"""Sines and cosines of the guidance scale that a latent consistency model reads."""


def save_unet(folder: Path, *, prediction: str = "epsilon", task: str = "", **changes: Any) -> Path:
    """A tiny pipeline folder with seeded random weights.

    Args:
        task: in the name of the pipeline's class, such as "Inpaint".
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(**{**TINY, **changes})
    with torch.no_grad():
        for value in model.parameters():  # what is zero or small at first would hide a wrong fold
            value.copy_(torch.randn_like(value) * (0.7 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.2))
    model.save_pretrained(folder / "unet")
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(**noise, clip_sample=False, steps_offset=1, prediction_type=prediction)
    scheduler.save_pretrained(folder / "scheduler")
    kinds = {"": "CLIPTextModel"}
    if "addition_embed_type" in changes:
        kinds["_2"] = "CLIPTextModelWithProjection"
    parts: dict[str, Any] = {}
    if task == "Img2Img":
        del kinds[""]
        parts = {"tokenizer": [None, None], "text_encoder": [None, None]}
        parts |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    for number, kind in kinds.items():
        save_clip(folder, number, kind, CLIP)
        parts[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
        parts[f"text_encoder{number}"] = ["transformers", kind]
    name = f"StableDiffusion{'XL' if '_2' in kinds else ''}{task}Pipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **parts}))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def save_lcm(folder: Path) -> Path:
    """The same of a latent consistency model."""
    save_unet(folder, time_cond_proj_dim=SCALE)
    for name, kind in (
        ("model_index.json", "LatentConsistencyModelPipeline"),
        ("scheduler/scheduler_config.json", "LCMScheduler"),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": kind}))
    return folder


def save_controlled(folder: Path, **changes: Any) -> Path:
    """The same with a ControlNet, whose residuals are about as large as what they are added to."""
    from diffusers import ControlNetModel

    save_unet(folder, task="ControlNet", **changes)
    values, names = {**TINY, **changes}, inspect.signature(ControlNetModel).parameters
    torch.manual_seed(1)
    controlnet = ControlNetModel(
        **{name: value for name, value in values.items() if name in names}, conditioning_embedding_out_channels=(8,) * 4
    )
    with torch.no_grad():
        for name, value in controlnet.named_parameters():
            gain = 2.0 if "cond_embedding" in name else 0.7  # its SiLUs would make the picture faint
            value.copy_(torch.randn_like(value) * (gain / value[0].numel() ** 0.5 if value.ndim > 1 else 0.2))
    controlnet.save_pretrained(folder / "controlnet")
    edit(folder / "model_index.json", controlnet=["diffusers", "ControlNetModel"])
    return folder


def unet_pipeline(folder: Path, unet: Any = None) -> Any:
    """diffusers' own pipeline of a folder."""
    import diffusers
    import transformers

    index, parts = json.loads((folder / "model_index.json").read_text()), {}
    for name, entry in index.items():
        if entry == [None, None] or isinstance(entry, bool):
            parts[name] = entry if isinstance(entry, bool) else None
        elif isinstance(entry, list):
            loaded = getattr(diffusers if name == "controlnet" else transformers, entry[1]).from_pretrained(folder / name)
            parts[name] = loaded if name.startswith("tokenizer") else loaded.eval()
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    plain = {} if "text_encoder_2" in parts else {"safety_checker": None, "feature_extractor": None}
    pipeline = getattr(diffusers, index["_class_name"])(
        **parts,
        **plain,
        vae=None,
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval() if unet is None else unet,
        scheduler=getattr(diffusers, kind).from_pretrained(folder / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_unet_pipeline(
    folder: Path, reference: Reference, chosen: Any, guidance: float, seed: int, unet: Any = None
) -> Float32:
    """From the prompts' texts, in 4 calls, and what the reference's first call reads beside noise: the mask and the picture
    around it, for the refiner the picture with its noise, and for a ControlNet the outlines of calibration."""
    pipeline, (_, height, width) = unet_pipeline(folder, unet), reference.feed_shape
    noise = torch.from_numpy(reference.noise(len(chosen), seed))
    start: dict[str, Any] = {"num_inference_steps": 4, "latents": noise, "height": 8 * height, "width": 8 * width}
    kind = type(pipeline).__name__
    if "ControlNet" in kind:
        start["image"] = outlines(8 * height, 8 * width, generators_of(noise.numpy()))
    elif kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"):
        first = torch.from_numpy(first_state(reference, chosen, seed))
        if first.shape[1] == INPAINT["in_channels"]:
            mask, hidden = first[:, 4:5].repeat_interleave(8, 2).repeat_interleave(8, 3), first[:, 5:]
            start |= {"image": hidden, "mask_image": mask, "masked_image_latents": hidden, "strength": 1.0}
        else:
            start = {"num_inference_steps": 14, "strength": 0.3, "image": torch.zeros_like(first), "latents": first}
        pipeline.vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    latents = pipeline(
        [PROMPTS[index] for index in chosen],
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **start,
    )
    return np.asarray(latents.images)


def drawn_by_both(folder: Path, vae: Any, engine: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of the first prompt by the folder's pipeline, as it is and with an engine as its `unet`."""
    pictures = []
    for unet in (None, engine):
        pipeline = unet_pipeline(folder)
        pipeline.vae = vae
        if unet is not None:
            pipeline.unet = unet
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipeline(list(PROMPTS[:1]), output_type="pt", generator=generator, **arguments).images)
    exact, actual = pictures
    return exact, actual


def drawn_by_reference(reference: Any, noise: Any, chosen: Any, *, guidance: float = 2.0) -> tuple[list[Feed], Any]:
    """What the network reads in each of 4 steps, and the latents that are drawn."""
    feeds: list[Feed] = []

    def watched(feed: Feed) -> Any:
        feeds.append(feed)
        return reference.forward(feed)

    latents = reference.draw(watched, noise, chosen, steps=4, guidance=guidance)
    return feeds, latents


def first_state(reference: Reference, chosen: Any, seed: int) -> Float32:
    """What the network reads in the first of 4 calls."""
    states: list[Float32] = []

    def first(feed: Feed) -> Float32:
        states.append(feed["sample"])
        return np.zeros_like(feed["sample"][:, :4])

    reference.draw(first, reference.noise(len(chosen), seed), chosen, steps=4, guidance=1.0)
    return states[0]
