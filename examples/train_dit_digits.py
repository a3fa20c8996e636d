"""Train `dit-digits`, the small DiT that ships with dq-export, on scikit-learn's digits.

The model is a class-conditional diffusers `DiTTransformer2DModel` over 16x16 pixels (no VAE): 6 blocks of width 192,
10 classes and a null class for classifier-free guidance, fixed sigma, linear betas. As in the hub's DiT checkpoints all
blocks hold the same timestep and label embedder; they are one module while training and copies in the saved file.

    pip install ".[cpu,test]" && python examples/train_dit_digits.py --output-dir dit-digits

Seeded, 2 cores, under an hour (bfloat16 autocast; a machine without AMX or AVX512-BF16 takes longer).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from sklearn.datasets import load_digits

SIZE, CLASSES = 16, 10
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits as float32[N, 1, 16, 16] in [-1, 1] (8x8, bilinear) and their labels int64[N]."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    large = torch.nn.functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return large, torch.tensor(data.target, dtype=torch.int64)


def new_model() -> DiTTransformer2DModel:
    """An untrained model: adaLN-zero initialisation, one embedder shared by all blocks."""
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_elementwise_affine=False,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    embedder = model.transformer_blocks[0].norm1.emb
    torch.nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
    for block in model.transformer_blocks:
        block.norm1.emb = embedder
        torch.nn.init.zeros_(block.norm1.linear.weight)
    for last in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(last.weight)
    return model


def warmed_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over 200 steps and falls to a fiftieth at the last one."""
    warmup = 200
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(i / warmup, 1.0) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(i / steps, 1.0))))
    )


def follow(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the moving average of a model's parameters towards them, after a number of steps."""
    decay = min(0.998, step / (step + 10))
    with torch.no_grad():
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)


def train(steps: int, batch: int, learning_rate: float, seed: int, folder: Path) -> None:
    """Predict epsilon for `steps` steps; save the weights' moving average every 500 steps and at the end."""
    torch.manual_seed(seed)
    images, labels = digits()
    scheduler = DDIMScheduler(**SCHEDULER)
    model = new_model()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = warmed_cosine(optimizer, steps)
    start = time.monotonic()
    smooth = float("nan")
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (batch,))
        clean, noise = images[rows], torch.randn(batch, 1, SIZE, SIZE)
        timestep = torch.randint(1000, (batch,))
        # The model itself drops labels for guidance (class_dropout_prob 0.1) while in training mode.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            noisy = scheduler.add_noise(clean, noise, timestep)
            predicted = model(noisy, timestep=timestep, class_labels=labels[rows]).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        follow(average, model, step)
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            elapsed = time.monotonic() - start
            print(
                f"step {step}/{steps}  loss {smooth:.4f}  {elapsed:.0f} s, {elapsed / step * (steps - step):.0f} s left",
                flush=True,
            )
        if step % 500 == 0 or step == steps:
            save(copy.deepcopy(average), folder)


def save(model: DiTTransformer2DModel, folder: Path) -> None:
    """Write a diffusers pipeline folder: model_index.json, scheduler/, transformer/ (float16 safetensors)."""
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(model.transformer_blocks[0].norm1.emb)
    model.half().save_pretrained(folder / "transformer", safe_serialization=True)
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.42.1",
        "id2label": {str(i): str(i) for i in range(CLASSES)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def run(train: Callable[[int, int, float, int, Path], None], text: str, *, folder: str, steps: int, learning_rate: float) -> None:
    """The command line of a training: `text` describes it, and the others are defaults."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path(folder))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options.steps, options.batch, options.learning_rate, options.seed, options.output_dir)
    print(f"saved {options.output_dir}")


def main() -> None:
    run(train, __doc__ or "", folder="dit-digits", steps=3000, learning_rate=1e-3)


if __name__ == "__main__":
    main()
