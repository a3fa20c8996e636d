"""Make a diffusers folder of PixArt-Sigma-XL/2's exact architecture with seeded random weights, and conditions for it.

    python benchmarks/pixart_xl.py FOLDER [--layers 28] [--pixels 512]

The configuration is that of PixArt-alpha/PixArt-Sigma-XL-2-512-MS: 28 blocks of width 1152, 611 M parameters, 2.4 GB in float32.
The random weights let every block add to the residual, like trained weights. Speed and memory equal those of the real model,
pictures do not. `FOLDER/conditions.safetensors` holds 4 random texts of 300 tokens in place of T5's, and a null text: pass it
as `--conditions`. There is no text encoder and no VAE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from random_texts import TEXTS, as_conditions

from dq_export.core.condition_file import save_conditions
from dq_export.core.network import Conditions

XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}
TOKENS, WIDTH = 300, 4096
PIXELS = (256, 512, 1024, 2048)


def make(folder: Path, *, layers: int = 28, pixels: int = 512, seed: int = 0) -> None:
    """Write the pipeline folder: transformer, PixArt's scheduler, and conditions."""
    torch.manual_seed(seed)
    size = {"sample_size": pixels // 8, "interpolation_scale": max(pixels // 512, 1), "num_layers": layers}
    model = PixArtTransformer2DModel(**{**XL, **size})
    with torch.no_grad():
        torch.nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
        torch.nn.init.normal_(model.adaln_single.linear.bias, std=0.2)
    model.save_pretrained(folder / "transformer", max_shard_size="5GB")
    DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}) + "\n")
    save_conditions(folder / "conditions.safetensors", conditions(seed))


def conditions(seed: int) -> Conditions:
    """Return random texts of different lengths, padded with masked tokens, and a null text of one token."""
    rng = np.random.default_rng(seed)
    states = rng.normal(scale=0.2, size=(TEXTS + 1, TOKENS, WIDTH)).astype(np.float32)
    lengths = np.asarray([1, 8, 20, 60, 200])
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.float32)
    rows = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    return as_conditions(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--pixels", type=int, default=512, choices=PIXELS)
    options = parser.parse_args()
    make(options.folder, layers=options.layers, pixels=options.pixels)
