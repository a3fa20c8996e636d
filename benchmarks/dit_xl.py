"""Make a diffusers folder of DiT-XL/2's exact architecture with seeded random weights and outliers in its activations.

    python benchmarks/dit_xl.py FOLDER [--layers 28] [--pickle]

The configuration is that of facebook/DiT-XL-2-256: 28 blocks of width 1152, 749 M parameters with diffusers' embedders in every
block, 3.0 GB in float32. The random weights let every block add to the residual, like trained weights. Then
`examples/hard_copy.py` spreads the channels of every quantized input (log-normal, sigma 0.5, and 1 channel in 64 by 20).
Speed and memory equal those of the real model, pictures do not. With `--pickle` the files have the format of the hub's model:
`diffusion_pytorch_model.bin`, and a configuration that diffusers wrote in 2023.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from hard_copy import harden

XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


OLD = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "cross_attention_dim": None,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
}
"""Entries of config.json of 2023 in addition to XL."""


def make(folder: Path, *, layers: int = 28, seed: int = 0, pickle: bool = False) -> None:
    """Write the pipeline folder: transformer and DDIM scheduler, no VAE."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**{**XL, "num_layers": layers})
    with torch.no_grad():
        for block in model.transformer_blocks:
            torch.nn.init.normal_(block.norm1.linear.weight, std=0.02)
            torch.nn.init.normal_(block.norm1.linear.bias, std=0.2)
        # diffusers keeps one copy of the embedders in every block; in the trained model they are equal.
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    harden(model, seed=seed, sigma=0.5, outlier=20.0)
    model.save_pretrained(folder / "transformer", max_shard_size="5GB", safe_serialization=not pickle)
    if pickle:
        (folder / "transformer" / "config.json").write_text(json.dumps({**XL, **OLD, "num_layers": layers}, indent=1))
    DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False).save_pretrained(folder / "scheduler")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--pickle", action="store_true", help="write the hub's file formats")
    options = parser.parse_args()
    make(options.folder, layers=options.layers, pickle=options.pickle)
