"""Train two small UNets, those of DDPM and of Stable Diffusion, on scikit-learn's digits, for measurements.

Both have three levels of 32, 64 and 64 channels over 16x16 pixels (no VAE) and predict noise:

* `OUTPUT/class`: a diffusers `UNet2DModel` with the digit as its class label. It has no null class, so nothing guides it.
* `OUTPUT/text`: a diffusers `UNet2DConditionModel`. It reads the prompts of `pixart-digits` through that model's text
  encoder, which stays as it is. A tenth of the prompts are empty, for classifier-free guidance. The folder has no text
  encoder: its `conditions.safetensors` holds the prompts that pixart-digits shows, to be passed as `--conditions`.

    pip install ".[cpu,test,text]" && python examples/train_unet_digits.py --output-dir unet-digits

Seeded, under 20 minutes each on one core.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from digit_training import CLASSES, SIZE, digits, fit, run
from train_dit_digits import SCHEDULER
from train_pixart_digits import EMPTY, LENGTH, SHOWN, prompts

from dq_export.core.condition_file import save_conditions
from dq_export.core.network import Conditions
from dq_export.families.source import load_reference

STATES = "encoder_hidden_states"
SHAPE: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def train(steps: int, batch: int, learning_rate: float, seed: int, folder: Path) -> None:
    """Both networks, one after the other."""
    train_class(steps, batch, learning_rate, seed, folder / "class")
    train_text(steps, batch, learning_rate, seed, folder / "text")


def train_class(steps: int, batch: int, learning_rate: float, seed: int, folder: Path) -> None:
    """The network that draws a class label; see `fit`."""
    torch.manual_seed(seed)
    images, labels = digits()
    scheduler = DDIMScheduler(**SCHEDULER)
    model = UNet2DModel(
        **SHAPE,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        num_class_embeds=CLASSES,
    )

    def loss_of(network: UNet2DModel) -> torch.Tensor:
        chosen = torch.randint(len(images), (batch,))
        noise, timestep = torch.randn(batch, 1, SIZE, SIZE), torch.randint(1000, (batch,))
        noisy = scheduler.add_noise(images[chosen], noise, timestep)
        return torch.nn.functional.mse_loss(network(noisy, timestep, labels[chosen]).sample, noise)

    fit(model, loss_of, lambda average: save(average, "DDPMPipeline", folder), steps=steps, learning_rate=learning_rate)


def train_text(steps: int, batch: int, learning_rate: float, seed: int, folder: Path) -> None:
    """The network that draws a prompt; see `fit`."""
    torch.manual_seed(seed)
    images, labels = digits()
    scheduler = DDIMScheduler(**SCHEDULER)
    texts = encoded([prompt for digit in range(CLASSES) for prompt in prompts(digit)])
    rows = torch.from_numpy(np.concatenate([texts.null[STATES], texts.arrays[STATES]]))
    shown, wordings = encoded(SHOWN), len(prompts(0))
    model = UNet2DConditionModel(
        **SHAPE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # the number of heads, in this class of diffusers
        cross_attention_dim=rows.shape[-1],
    )

    def loss_of(network: UNet2DConditionModel) -> torch.Tensor:
        chosen = torch.randint(len(images), (batch,))
        noise, timestep = torch.randn(batch, 1, SIZE, SIZE), torch.randint(1000, (batch,))
        text = 1 + labels[chosen] * wordings + torch.randint(wordings, (batch,))
        text[torch.rand(batch) < EMPTY] = 0
        noisy = scheduler.add_noise(images[chosen], noise, timestep)
        return torch.nn.functional.mse_loss(network(noisy, timestep, rows[text]).sample, noise)

    def save_all(average: UNet2DConditionModel) -> None:
        save(average, "StableDiffusionPipeline", folder)
        save_conditions(folder / "conditions.safetensors", shown)

    fit(model, loss_of, save_all, steps=steps, learning_rate=learning_rate)


def encoded(texts: Sequence[str]) -> Conditions:
    """The states of `pixart-digits`' encoder, zeros after a text's end: this network has no mask."""
    conditions = load_reference("pixart-digits").encode(texts, "cpu")
    parts = []
    for arrays in (conditions.arrays, conditions.null):
        parts.append({STATES: arrays[STATES][:, :LENGTH] * arrays["encoder_attention_mask"][:, :LENGTH, None]})
    return Conditions(names=tuple(texts), arrays=parts[0], null=parts[1])


def save(model: Any, pipeline: str, folder: Path) -> None:
    """Write a diffusers pipeline folder: model_index.json, scheduler/, unet/ (float16 safetensors)."""
    model.half().save_pretrained(folder / "unet")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}) + "\n")


if __name__ == "__main__":
    run(train, __doc__ or "", folder="unet-digits", steps=2000, learning_rate=1.5e-3, batch=64)
