"""Tiny PixArt pipelines: Sigma's, and alpha's at 1024 pixels, which is called with the picture's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy import PROMPTS, WIDTH, save_text_encoder

from dq_export.core.network import Float32
from dq_export.families.reference import Reference

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 4,
    "cross_attention_dim": 48,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": WIDTH,
}
ALPHA = {"sample_size": 128, "patch_size": 16, "num_layers": 2}
"""The size at which PixArtAlphaPipeline sends resolution and aspect ratio."""


def save_pixart(folder: Path, *, pipeline: str = "PixArtSigmaPipeline", **changes: Any) -> Path:
    """A tiny pipeline folder with seeded random weights."""
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**{**TINY, **changes})
    with torch.no_grad():
        for value in model.parameters():  # what is small at first would hide a wrong fold
            value.copy_(torch.randn_like(value) * (0.5 / value.shape[-1] ** 0.5 if value.ndim > 1 else 0.2))
    model.save_pretrained(folder / "transformer")
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    scheduler.save_pretrained(folder / "scheduler")
    save_text_encoder(folder)
    parts = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts}))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def drawn_by_pixart_pipeline(folder: Path, reference: Reference, chosen: Any, guidance: float, seed: int) -> Float32:
    """From the prompts' texts, by the pipeline that the folder names."""
    import diffusers
    from transformers import T5EncoderModel, T5Tokenizer

    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, kind)(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
        vae=None,
        transformer=diffusers.PixArtTransformer2DModel.from_pretrained(folder / "transformer").eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        [PROMPTS[index] for index in chosen],
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=torch.from_numpy(reference.noise(len(chosen), seed)),
        output_type="latent",
        clean_caption=False,
        use_resolution_binning=False,
    )
    return np.asarray(latents.images)
