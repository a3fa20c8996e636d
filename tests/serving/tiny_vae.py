"""A tiny VAE with random weights for pipelines that a server decodes with."""

from __future__ import annotations

from pathlib import Path


def save_vae(folder: Path, *, channels: int, size: int) -> None:
    """Write `folder/vae`, of two levels: a latent has `channels` channels and is 2 pixels of a picture along a side."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    vae = AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=size,
        scaling_factor=0.3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae", safe_serialization=True)
