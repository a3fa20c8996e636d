"""Train `dit-digits`, the small DiT that ships with dq-export, on scikit-learn's digits.

The model is a class-conditional diffusers `DiTTransformer2DModel` over 16x16 pixels (no VAE): 6 blocks of width 192,
10 classes and a null class for classifier-free guidance, fixed sigma, linear betas. As in the hub's DiT checkpoints all
blocks hold the same timestep and label embedder; they are one module while training and copies in the saved file.

    pip install ".[cpu,test]" && python examples/train_dit_digits.py --output-dir dit-digits

Seeded, 2 cores, under an hour (bfloat16 autocast; a machine without AMX or AVX512-BF16 takes longer).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from digit_training import CLASSES, SIZE, digits, fit, run

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


def train(steps: int, batch: int, learning_rate: float, seed: int, folder: Path) -> None:
    """Predict epsilon for `steps` steps; see `fit`."""
    torch.manual_seed(seed)
    images, labels = digits()
    scheduler = DDIMScheduler(**SCHEDULER)

    def loss_of(model: DiTTransformer2DModel) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,))
        clean, noise = images[rows], torch.randn(batch, 1, SIZE, SIZE)
        timestep = torch.randint(1000, (batch,))
        # The model itself drops labels for guidance (class_dropout_prob 0.1) while in training mode.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            noisy = scheduler.add_noise(clean, noise, timestep)
            predicted = model(noisy, timestep=timestep, class_labels=labels[rows]).sample
        return torch.nn.functional.mse_loss(predicted.float(), noise)

    fit(new_model(), loss_of, lambda average: save(average, folder), steps=steps, learning_rate=learning_rate)


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


def main() -> None:
    run(train, __doc__ or "", folder="dit-digits", steps=3000, learning_rate=1e-3)


if __name__ == "__main__":
    main()
