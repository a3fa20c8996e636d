"""A family that is not a DiT: other names, fractional timesteps, text, any size, and a pipeline that samples it.

This file and a line in `FAMILIES` are all that a new family takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from pydantic import Field

from dq_export.core.network import BATCH, Axis, Conditions, Float32, Input
from dq_export.families.config_values import Values
from dq_export.families.family import Family, Pictures
from dq_export.families.stand_in import StandIn

TOKENS, WIDTH, STRENGTH = 5, 8, 1.5
WORDS = ("a", "red", "green", "blue", "square", "circle", "beside")
PROMPTS = ("a red square", "a green circle", "a blue square", "a red circle beside")


class ToyBlock(torch.nn.Module):
    """x -> x + fc2(gelu(fc1(norm(x) * (1 + scale) + shift)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = torch.nn.Linear(width, 2 * width)
        self.norm = torch.nn.LayerNorm(width, elementwise_affine=False)
        self.fc1, self.fc2 = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=-1)
        modulated = self.norm(x) * (1 + scale) + shift
        changed: torch.Tensor = self.fc2(torch.nn.functional.gelu(self.fc1(modulated)))
        return x + changed


class ToyNetwork(ModelMixin, ConfigMixin):
    """Predicts the noise of `sample` [B, C, H, W] from fractional timesteps, `context` [B, L, 8] and `strength` [B, 1]; every
    pixel by itself."""

    @register_to_config
    def __init__(self, channels: int = 3, width: int = 16, depth: int = 4, size: int = 6) -> None:
        super().__init__()
        self.embed, self.text, self.out = (
            torch.nn.Linear(a, b) for a, b in ((channels, width), (WIDTH, width), (width, channels))
        )
        self.layers = torch.nn.ModuleList([ToyBlock(width) for _ in range(depth)])

    def forward(
        self, sample: Any, timestep: Any, context: Any, added: Any = None, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        angles = timestep[:, None] * torch.logspace(0, -3, self.config.width // 2)
        embedding = self.text(context.mean(dim=1)) * added["strength"] + torch.cat([angles.cos(), angles.sin()], dim=-1)
        x = self.embed(sample.flatten(2).transpose(1, 2))
        for layer in self.layers:
            x = layer(x, embedding)
        return (self.out(x).transpose(1, 2).reshape(sample.shape),)


class ToyPipeline(DiffusionPipeline):
    """Samples latents with classifier-free guidance, the null prompt first."""

    def __init__(self, transformer: Any, scheduler: Any, tokenizer: Any = None, text_encoder: Any = None) -> None:
        super().__init__()
        parts = {"tokenizer": tokenizer, "text_encoder": text_encoder}
        self.register_modules(transformer=transformer, scheduler=scheduler, **parts)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        words = self.tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        states: torch.Tensor = self.text_encoder(words.input_ids, attention_mask=words.attention_mask).last_hidden_state
        return states * words.attention_mask[..., None]

    @torch.no_grad()
    def __call__(self, context: torch.Tensor, null: Any, latents: torch.Tensor, steps: int, guidance: float) -> Any:
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma
        prompts = context if null is None else torch.cat([null, context])
        added = {"strength": torch.full((len(prompts), 1), STRENGTH)}
        for t in self.scheduler.timesteps:
            states = self.scheduler.scale_model_input(latents if null is None else torch.cat([latents, latents]), t)
            timesteps = t.expand(len(states))
            predicted = self.transformer(states, timesteps, context=prompts, added=added, return_dict=False)[0]
            if null is not None:
                without, with_prompt = predicted.chunk(2)
                predicted = without + guidance * (with_prompt - without)
            latents = self.scheduler.step(predicted, t, latents).prev_sample
        return latents


class ToyValues(Values):
    """Of `ToyNetwork`."""

    channels: int = Field(3, ge=1, le=64)
    depth: int = Field(4, ge=1, le=64)


class Toy(Family):
    """The family."""

    name = "toy"
    architectures = ("ToyNetwork",)
    values = ToyValues
    encoders = ("tokenizer", "text_encoder")
    prompt_tokens = {"ToyPipeline": TOKENS}  # noqa: RUF012
    blocks = ("layers",)
    default_guidance = 3.0
    default_scheduler = {"_class_name": "EulerDiscreteScheduler"}  # noqa: RUF012

    def network_class(self, architecture: str) -> Any:
        return ToyNetwork

    def prepare(self, model: Any) -> None:
        return

    def inputs(self, model: Any) -> tuple[Input, ...]:
        height, width = Axis("height", model.config.size, 64), Axis("width", model.config.size, 64)
        return (
            Input(name="sample", role="state", dtype="float32", shape=(BATCH, model.config.channels, height, width)),
            Input(name="timestep", role="timestep", dtype="float32"),
            Input(name="context", role="condition", dtype="float32", shape=(BATCH, Axis("length", TOKENS, 64), WIDTH)),
            Input(name="strength", role="condition", dtype="float32", shape=(BATCH, 1), within="added"),
        )

    def encode(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Conditions:
        context = ToyPipeline(None, None, **parts).encode_prompt([*prompts, ""]).numpy()
        strength = np.full((len(context), 1), STRENGTH, dtype=np.float32)
        rows, null = ({"context": context[part], "strength": strength[part]} for part in (slice(-1), slice(-1, None)))
        return Conditions(names=tuple(prompts), arrays=rows, null=null)

    def largest_activation(self, model: Any) -> int:
        return int(2 * model.config.width * model.config.size**2)

    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        pipeline = ToyPipeline(network, scheduler)
        context = torch.from_numpy(pictures.conditions["context"])
        null = torch.from_numpy(pictures.null["context"]) if guidance > 1 else None
        latents: Float32 = pipeline(context, null, torch.from_numpy(pictures.noise), steps, guidance).numpy()
        return latents


def save_toy(folder: Path, **changes: Any) -> Path:
    """A tiny pipeline folder of the family, with seeded random weights."""
    torch.manual_seed(0)
    ToyNetwork(**changes).save_pretrained(folder / "transformer")
    EulerDiscreteScheduler(timestep_spacing="linspace").save_pretrained(folder / "scheduler")  # fractional timesteps
    save_text_encoder(folder)
    parts = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline", **parts}))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def save_text_encoder(folder: Path, dtype: torch.dtype = torch.float32, number: str = "") -> None:
    """A T5 of two blocks and its tokenizer of seven words; `number`: behind the names of their folders."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -9.0)]
    vocabulary = [*marks, *((f"\u2581{word}", -1.0) for word in WORDS)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder / f"tokenizer{number}")
    torch.manual_seed(1)
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **sizes))
    encoder.to(dtype).save_pretrained(folder / f"text_encoder{number}")


TOY = Toy()
