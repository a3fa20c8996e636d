"""A tiny Stable Diffusion 3.5 pipeline: a block with dual attention, a plain one, and the last one, which gives no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy import PROMPTS, WIDTH, WORDS, save_text_encoder

from dq_export.core.network import Float32
from dq_export.families.reference import Reference

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "pos_embed_max_size": 9,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 24,
    "pooled_projection_dim": WIDTH,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}
SHIFT = 3.0
CLIP = WIDTH // 2
"""Width of each of the two CLIP encoders, whose states lie beside each other in T5's width."""


def save_sd3(folder: Path, *, t5: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny pipeline folder with seeded random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(**{**TINY, **changes})
    noisy(model)
    model.to(dtype).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    parts: dict[str, list[str | None]] = {}
    for number in ("", "_2"):
        save_clip(folder, number, "CLIPTextModelWithProjection")
        parts[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
        parts[f"text_encoder{number}"] = ["transformers", "CLIPTextModelWithProjection"]
    parts |= {name: [None, None] for name in ("tokenizer_3", "text_encoder_3")}
    if t5:
        save_text_encoder(folder, number="_3")
        parts |= {"tokenizer_3": ["transformers", "T5Tokenizer"], "text_encoder_3": ["transformers", "T5EncoderModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **parts}))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def noisy(model: Any) -> None:
    """Random parameters: what is zero or small at first would hide a wrong fold."""
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * (0.5 / value.shape[-1] ** 0.5 if value.ndim > 1 else 0.2))


def save_clip(folder: Path, number: str, kind: str, width: int = CLIP) -> None:
    """A CLIP of two layers, and its tokenizer of single letters."""
    import transformers

    letters = sorted({letter for word in WORDS for letter in word})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder / f"tokenizer{number}")
    torch.manual_seed(2 + len(number))
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=8, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, eos_token_id=len(tokens) - 1, bos_token_id=len(tokens) - 2, pad_token_id=len(tokens) - 1,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    noisy(model)
    model.save_pretrained(folder / f"text_encoder{number}")


def sd3_pipeline(folder: Path, transformer: Any = None, scheduler: str = "FlowMatchEulerDiscreteScheduler") -> Any:
    """diffusers' own pipeline of a folder."""
    import diffusers
    import transformers

    index, parts = json.loads((folder / "model_index.json").read_text()), {}
    for name, (library, kind) in ((name, entry) for name, entry in index.items() if isinstance(entry, list)):
        loaded = getattr(transformers, kind).from_pretrained(folder / name) if library else None
        parts[name] = loaded.eval() if name.startswith("text_encoder") and loaded is not None else loaded
    network_class = diffusers.SD3Transformer2DModel
    pipeline = diffusers.StableDiffusion3Pipeline(
        **parts,
        vae=None,
        transformer=network_class.from_pretrained(folder / "transformer").eval() if transformer is None else transformer,
        scheduler=getattr(diffusers, scheduler).from_pretrained(folder / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_sd3_pipeline(folder: Path, reference: Reference, chosen: Any, guidance: float, seed: int) -> Float32:
    """From the prompts' texts."""
    latents = sd3_pipeline(folder)(
        [PROMPTS[index] for index in chosen],
        num_inference_steps=4,
        guidance_scale=guidance,
        height=64,
        width=64,
        latents=torch.from_numpy(reference.noise(len(chosen), seed)),
        output_type="latent",
    )
    return np.asarray(latents.images)
