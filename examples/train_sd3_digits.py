"""Train a small MMDiT, the network of Stable Diffusion 3.5, on scikit-learn's digits, for measurements.

A diffusers `SD3Transformer2DModel` over 16x16 pixels (no VAE): 6 blocks of width 128, the first two with dual attention,
trained by flow matching. It reads the prompts of `pixart-digits` through that model's text encoder, which stays as it is.
A tenth of the prompts are empty, for classifier-free guidance. The folder has no text encoder: its `conditions.safetensors`
holds the prompts that pixart-digits shows, to be passed as `--conditions`.

    pip install ".[cpu,test,text]" && python examples/train_sd3_digits.py --output-dir sd3-digits

Seeded, 2 cores, under 40 minutes (bfloat16 autocast; a machine without AMX or AVX512-BF16 takes longer).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from digit_training import CLASSES, SIZE, digits, fit, run
from train_pixart_digits import EMPTY, LENGTH, SHOWN, prompts

from dq_export.core.condition_file import save_conditions
from dq_export.core.network import Conditions
from dq_export.families.source import load_reference

STATES, POOLED = "encoder_hidden_states", "pooled_projections"


def new_model(width: int) -> SD3Transformer2DModel:
    """An untrained model, whose blocks at first do nothing. `width` is that of the text's states."""
    model = SD3Transformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        sample_size=SIZE,
        patch_size=2,
        pos_embed_max_size=SIZE // 2,
        joint_attention_dim=width,
        caption_projection_dim=128,
        pooled_projection_dim=width,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def encoded(texts: Sequence[str]) -> Conditions:
    """The states of `pixart-digits`' encoder, zeros after a text's end, and their sums: this network has no mask."""
    conditions = load_reference("pixart-digits").encode(texts, "cpu")
    parts = []
    for arrays in (conditions.arrays, conditions.null):
        states = arrays[STATES][:, :LENGTH] * arrays["encoder_attention_mask"][:, :LENGTH, None]
        parts.append({STATES: states, POOLED: states.sum(axis=1)})
    return Conditions(names=tuple(texts), arrays=parts[0], null=parts[1])


def train(steps: int, batch: int, learning_rate: float, seed: int, folder: Path) -> None:
    """Predict noise - picture for `steps` steps; save the weights' moving average every 250 steps and at the end."""
    torch.manual_seed(seed)
    images, labels = digits()
    texts = encoded([prompt for digit in range(CLASSES) for prompt in prompts(digit)])
    rows = {name: torch.from_numpy(np.concatenate([texts.null[name], value])) for name, value in texts.arrays.items()}
    shown = encoded(SHOWN)
    wordings = len(prompts(0))

    def loss_of(model: SD3Transformer2DModel) -> torch.Tensor:
        chosen = torch.randint(len(images), (batch,))
        clean, noise, sigma = images[chosen], torch.randn(batch, 1, SIZE, SIZE), torch.rand(batch)
        text = 1 + labels[chosen] * wordings + torch.randint(wordings, (batch,))
        text[torch.rand(batch) < EMPTY] = 0
        level = sigma[:, None, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            noisy = (1 - level) * clean + level * noise
            predicted = model(noisy, rows[STATES][text], rows[POOLED][text], 1000 * sigma).sample
        return torch.nn.functional.mse_loss(predicted.float(), noise - clean)

    def save(model: SD3Transformer2DModel) -> None:
        model.half().save_pretrained(folder / "transformer")
        FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}) + "\n")
        save_conditions(folder / "conditions.safetensors", shown)

    fit(new_model(rows[POOLED].shape[1]), loss_of, save, steps=steps, learning_rate=learning_rate)


if __name__ == "__main__":
    run(train, __doc__ or "", folder="sd3-digits", steps=1200, learning_rate=1.5e-3)
