"""Make a diffusers folder of Stable Diffusion 1.5's or XL's exact UNet with seeded random weights, and conditions for it.

    python benchmarks/unet_xl.py FOLDER --network sd1.5 [--layers 2] [--dtype fp32]

Stable Diffusion 1.5 has 860 M parameters, 3.4 GB in float32, and draws pictures of 512 pixels; XL has 2.6 G, 10.3 GB, and 1024.
`--layers` is the number of layers of each level, 2 in both. The weights are PyTorch's initial random ones: speed and memory equal
those of the real model, pictures do not. `FOLDER/conditions.safetensors` holds 4 random texts of 77 tokens in place of CLIP's,
and a null text: pass it as `--conditions`. There is no text encoder and no VAE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from random_texts import TEXTS, as_conditions

from dq_export.core.condition_file import save_conditions
from dq_export.core.network import Conditions
from dq_export.families.unet import SCHEDULER

SD15: dict[str, Any] = {
    "sample_size": 64,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""Other values are diffusers' defaults."""
NETWORKS = {"sd1.5": (SD15, "StableDiffusionPipeline"), "sdxl": (SDXL, "StableDiffusionXLPipeline")}
TOKENS, POOLED = 77, 1280


def make(folder: Path, network: str, layers: int, dtype: str, *, seed: int = 0) -> None:
    """Write the pipeline folder: UNet, DDIM with Stable Diffusion's noise schedule, and conditions."""
    config, pipeline = NETWORKS[network]
    torch.manual_seed(seed)
    torch.set_default_dtype({"fp16": torch.float16, "fp32": torch.float32}[dtype])
    model = UNet2DConditionModel(**config, layers_per_block=layers)
    model.save_pretrained(folder / "unet", max_shard_size="12GB")
    settings = {key: value for key, value in SCHEDULER.items() if key != "_class_name"}
    DDIMScheduler(**settings).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}) + "\n")
    save_conditions(folder / "conditions.safetensors", conditions(config, seed))


def conditions(config: dict[str, Any], seed: int) -> Conditions:
    """Return random texts, and a null text."""
    rng = np.random.default_rng(seed)
    shape = (TEXTS + 1, TOKENS, config["cross_attention_dim"])
    rows = {"encoder_hidden_states": rng.normal(size=shape).astype(np.float32)}
    if "addition_embed_type" in config:
        rows["text_embeds"] = rng.normal(size=(TEXTS + 1, POOLED)).astype(np.float32)
    return as_conditions(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=tuple(NETWORKS), required=True)
    parser.add_argument("--layers", type=int, default=2, help="layers of each level")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp32")
    options = parser.parse_args()
    make(options.folder, options.network, options.layers, options.dtype)
