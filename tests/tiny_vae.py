"""A tiny VAE with random weights, with attention in its middle, as every published one has."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_vae(folder: Path, **options: Any) -> Any:
    """Write a VAE to `folder` and return it.

    Args:
        options: of diffusers' class, in place of two levels for latents of 2 x 8 x 8 with pictures of 16 x 16.
    """
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    values = {"latent_channels": 2, "block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16, **options}
    levels = len(values["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    vae = AutoencoderKL(**values, **kinds).eval()
    vae.save_pretrained(folder, safe_serialization=True)
    return vae


def save_flux2_vae(folder: Path, channels: int, **options: Any) -> Any:
    """Write a VAE of FLUX.2's class to `folder` and return it; its statistics are not those of a new batch norm.

    Args:
        channels: of the network's tokens.
        options: of diffusers' class, in place of four levels with pictures of 8 x 8 for a latent.
    """
    import torch
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(1)
    values = {"latent_channels": channels // 4, "block_out_channels": (8,) * 4, "norm_num_groups": 4, **options}
    vae = AutoencoderKLFlux2(**values).eval()
    vae.bn.running_mean.copy_(torch.randn(channels))
    vae.bn.running_var.copy_(torch.rand(channels) + 0.5)
    vae.save_pretrained(folder, safe_serialization=True)
    return vae
