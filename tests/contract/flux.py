"""A tiny FLUX pipeline with a guidance embedding: two blocks of two streams and two of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sd3 import CLIP, noisy, save_clip
from toy import PROMPTS, WIDTH, save_text_encoder

from dq_export.core.network import Float32
from dq_export.families.reference import Reference

TINY = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": CLIP,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
SIDE = (64, 96)
"""Height and width of its pictures in pixels: 4 x 6 tokens."""


def save_flux(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny pipeline folder with seeded random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**TINY, **changes})
    noisy(model)
    model.to(dtype).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    save_clip(folder, "", "CLIPTextModel")
    save_text_encoder(folder, number="_2")
    parts = {"tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModel", "tokenizer_2": "T5Tokenizer"}
    parts["text_encoder_2"] = "T5EncoderModel"
    index = {name: ["transformers", kind] for name, kind in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **index}))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def flux_pipeline(folder: Path, transformer: Any = None, kind: str = "FluxPipeline", vae: Any = None) -> Any:
    """diffusers' own pipeline of a folder."""
    import diffusers
    import transformers

    pipeline = getattr(diffusers, kind)(
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        tokenizer_2=transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2").eval(),
        vae=vae,
        transformer=diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer").eval()
        if transformer is None
        else transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_flux_pipeline(folder: Path, reference: Reference, chosen: Any, guidance: float, seed: int) -> Float32:
    """From the prompts' texts."""
    height, width = SIDE
    latents = flux_pipeline(folder)(
        [PROMPTS[index] for index in chosen],
        num_inference_steps=4,
        guidance_scale=guidance,
        height=height,
        width=width,
        latents=torch.from_numpy(reference.noise(len(chosen), seed)),
        output_type="latent",
    )
    return np.asarray(latents.images)
