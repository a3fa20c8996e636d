"""Train `pixart-digits`, the small text-to-image model that ships with dq-export, on scikit-learn's digits.

A diffusers `PixArtTransformer2DModel` over 16x16 pixels (no VAE): 6 blocks of width 128. It reads prompts ("a seven", "the
digit 7") through a T5 encoder of 2 layers and width 64, which is trained with it, and a tokenizer of whole words.
A tenth of the prompts are empty, for classifier-free guidance. The folder is laid out as PixArt-Sigma's on the hub.

    pip install ".[cpu,test,text]" && python examples/train_pixart_digits.py --output-dir pixart-digits

Seeded, 2 cores, under 40 minutes (bfloat16 autocast; a machine without AMX or AVX512-BF16 takes longer).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from digit_training import CLASSES, SIZE, digits, fit, run
from transformers import T5Config, T5EncoderModel, T5Tokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNKNOWN = "?"
"""A word outside the vocabulary, so that the model learns to draw the digit among unknown words."""
TEMPLATES = (
    "{}", "a {}", "the {}", "number {}", "the number {}", "digit {}", "the digit {}", "a handwritten {}",
    "handwritten digit {}", "draw a {}", "draw the digit {}", "write a {}", "please write the number {}",
    "a drawing of a {}", "a picture of the number {}", "an image of a {}", "a photo of a handwritten {}",
    f"a {UNKNOWN} {{}}", f"{UNKNOWN} {{}} {UNKNOWN}", f"{UNKNOWN} a {{}} {UNKNOWN}",
)  # fmt: skip
SHOWN = (
    *(f"an {name}" if name == "eight" else f"a {name}" for name in NAMES),
    *(f"the digit {digit}" for digit in range(10)),
    *(f"a handwritten {name}" for name in NAMES),
)
"""prompts.txt."""
EMPTY = 0.1
"""Share of prompts that are replaced by the empty one."""
LENGTH = 16
"""Tokens of a prompt while training; more are only padding, which the mask hides."""
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def prompts(digit: int) -> list[str]:
    """Every wording for a digit, with its name and with its numeral."""
    return [template.format(word) for template in TEMPLATES for word in (NAMES[digit], str(digit))]


def new_tokenizer() -> T5Tokenizer:
    """T5's tokenizer over the words of all prompts; other words become <unk>."""
    words = sorted({word for digit in range(CLASSES) for prompt in prompts(digit) for word in prompt.split()} - {UNKNOWN})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=300)


class TextToDigit(torch.nn.Module):
    """The two networks, trained as one."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.text_encoder = T5EncoderModel(
            T5Config(vocab_size=words, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, dropout_rate=0.0)
        )
        self.transformer = PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=1,
            out_channels=1,
            num_layers=6,
            cross_attention_dim=128,
            sample_size=SIZE,
            patch_size=2,
            caption_channels=64,
            use_additional_conditions=False,
        )
        torch.nn.init.zeros_(self.transformer.proj_out.weight)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The noise in float32[B, 1, 16, 16], after the prompts int64[B, L] with a mask (1 keeps)."""
        text = self.text_encoder(tokens, attention_mask=mask)[0]
        predicted: torch.Tensor = self.transformer(
            noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timestep
        ).sample
        return predicted


def train(steps: int, batch: int, learning_rate: float, seed: int, folder: Path) -> None:
    """Predict epsilon for `steps` steps; see `fit`."""
    torch.manual_seed(seed)
    images, labels = digits()
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
    signal = scheduler.alphas_cumprod.sqrt()[:, None, None, None]
    noise_level = (1 - scheduler.alphas_cumprod).sqrt()[:, None, None, None]
    tokenizer = new_tokenizer()
    texts = ["", *(prompt for digit in range(CLASSES) for prompt in prompts(digit))]
    encoded = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    wordings = len(prompts(0))
    model = TextToDigit(len(tokenizer))
    model.transformer.set_attn_processor(AttnProcessor())  # on a CPU its step takes half the time of the fused one's

    def loss_of(model: TextToDigit) -> torch.Tensor:
        rows = torch.randint(len(images), (batch,))
        clean, noise, timestep = images[rows], torch.randn(batch, 1, SIZE, SIZE), torch.randint(1000, (batch,))
        chosen = 1 + labels[rows] * wordings + torch.randint(wordings, (batch,))
        chosen[torch.rand(batch) < EMPTY] = 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            noisy = signal[timestep] * clean + noise_level[timestep] * noise
            predicted = model(noisy, timestep, encoded.input_ids[chosen], encoded.attention_mask[chosen])
        return torch.nn.functional.mse_loss(predicted.float(), noise)

    fit(model, loss_of, lambda average: save(average, tokenizer, folder), steps=steps, learning_rate=learning_rate)


def save(model: TextToDigit, tokenizer: T5Tokenizer, folder: Path) -> None:
    """Write a diffusers pipeline folder; the transformer as float16, the encoder as float32, which transformers computes in."""
    model.transformer.half().save_pretrained(folder / "transformer", safe_serialization=True)
    model.text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    DPMSolverMultistepScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "PixArtSigmaPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "prompts.txt").write_text("\n".join(SHOWN) + "\n")


def main() -> None:
    run(train, __doc__ or "", folder="pixart-digits", steps=2400, learning_rate=1.5e-3)


if __name__ == "__main__":
    main()
