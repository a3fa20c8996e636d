"""Tiny DDPM checkpoints: `UNet2DModel` as google/ddpm-cifar10-32 has it, and one that draws class labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dq_export.core.network import Float32
from dq_export.families.reference import Reference

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": None,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CLASSES = 5


def save_ddpm(folder: Path, **changes: Any) -> Path:
    """A tiny pipeline folder with seeded random weights."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(**{**TINY, **changes})
    with torch.no_grad():
        for value in model.parameters():  # what is zero or small at first would hide a wrong fold
            value.copy_(torch.randn_like(value) * (0.7 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.2))
    model.save_pretrained(folder / "unet")
    DDPMScheduler(variance_type="fixed_large").save_pretrained(folder / "scheduler")
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **parts}))
    return folder


def drawn_by_ddpm_pipeline(
    folder: Path, reference: Reference, labels: Any, seed: int, *, name: str = "DDPM", unet: Any = None
) -> Float32:
    """In 4 steps. The pipelines take no noise and clamp their pictures: theirs is ours, and the last step's picture is kept.

    Args:
        labels: one a picture; None: the network takes none.
        name: DDPM or DDIM.
    """
    import diffusers

    network = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval() if unet is None else unet
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    pipeline = getattr(diffusers, f"{name}Pipeline")(network if labels is None else _Labelled(network, labels), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[torch.Tensor] = []
    step = pipeline.scheduler.step

    def record(*arguments: Any, **named: Any) -> Any:
        moved = step(*arguments, **named)
        pictures.append(moved.prev_sample)
        return moved

    pipeline.scheduler.step = record
    count = 2 if labels is None else len(labels)
    noise = torch.from_numpy(reference.noise(count, seed))
    with patch(f"diffusers.pipelines.{name.lower()}.pipeline_{name.lower()}.randn_tensor", lambda *_, **__: noise):
        generator = torch.Generator().manual_seed(0)
        pipeline(count, generator, num_inference_steps=4, output_type="np")
    return np.asarray(pictures[-1])


class _Labelled:
    """A network that calls another one with labels, which the pipelines do not know."""

    def __init__(self, network: Any, labels: Any) -> None:
        self.network, self.config, self.dtype = network, network.config, torch.float32
        self.labels = torch.from_numpy(np.asarray(labels))

    def __call__(self, image: torch.Tensor, timestep: Any) -> Any:
        with torch.no_grad():
            return self.network(image, timestep, class_labels=self.labels)
