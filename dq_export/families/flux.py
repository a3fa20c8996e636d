"""Family `flux`: text to image with diffusers `FluxTransformer2DModel`: FLUX.1 dev and schnell, of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dq_export.core.network import BATCH, Axis, Conditions, Input, axes_of

from .config_values import Values
from .embeddings import settle_rotations, settle_timesteps
from .family import Family, Pictures
from .flux_values import FluxValues
from .pipelines import latents_of, pipeline_of
from .prediction import FLOW
from .reference import Float32
from .stand_in import StandIn

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""FLUX.1-dev's scheduler, for a folder without one."""
PIPELINE = "FluxPipeline"
TOKENS = 512
"""The number of tokens to which the pipeline fills every text up."""
SIDE, LONGEST = 1024, 2048
"""Pixels along an axis of a square picture: the pipeline's default, and the greatest number that the graph takes."""
PIXELS = 16
"""Pixels of a token, a patch of 2 x 2 latents, along an axis. Source: the pipeline's `vae_scale_factor` without a VAE."""
STATES, POOLED = "encoder_hidden_states", "pooled_projections"
PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


class Flux(Family):
    """The family's data; prompts and sampling are those of diffusers' own pipeline."""

    name = "flux"
    architectures = ("FluxTransformer2DModel",)
    values: type[Values] = FluxValues
    encoders: tuple[str, ...] = PARTS
    prompt_tokens = {PIPELINE: TOKENS}  # noqa: RUF012
    blocks = ("transformer_blocks", "single_transformer_blocks")
    prediction = FLOW
    unit = PIXELS
    requests = {STATES: "prompt_embeds", POOLED: "pooled_prompt_embeds"}  # noqa: RUF012
    picture_positions = {"img_ids": ("zero", "row", "column")}  # noqa: RUF012
    text_positions = {"txt_ids": ("zero",) * 3}  # noqa: RUF012
    packing = 2
    timestep_divisor = 1000.0
    default_guidance = 3.5  # the pipeline's
    default_scheduler = SCHEDULER

    def prepare(self, model: Any) -> None:
        """See `Family.prepare`."""
        settle_timesteps(model)
        settle_rotations(model)

    def scheduler_of(self, config: Any) -> Mapping[str, Any]:
        """See `Family.scheduler_of`. schnell's steps have the same length at every size."""
        return SCHEDULER if config.guidance_embeds else {**SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}

    def guided_by(self, config: Any) -> Literal["null", "input", "nothing"]:
        """See `Family.guided_by`. schnell, made for few steps, has no guidance."""
        return "input" if config.guidance_embeds else "nothing"

    def inputs(self, model: Any) -> tuple[Input, ...]:
        """See `Family.inputs`."""
        config = model.config
        tokens = Axis("tokens", (SIDE // PIXELS) ** 2, (LONGEST // PIXELS) ** 2)
        length = Axis("length", TOKENS)
        guidance = Input(name="guidance", role="setting", dtype="float32")
        return (
            Input(name="hidden_states", role="state", dtype="float32", shape=(BATCH, tokens, config.in_channels)),
            Input(name="timestep", role="timestep", dtype="float32"),
            Input(name=STATES, role="condition", dtype="float32", shape=(BATCH, length, config.joint_attention_dim)),
            Input(name=POOLED, role="condition", dtype="float32", shape=(BATCH, config.pooled_projection_dim)),
            Input(name="img_ids", role="setting", dtype="float32", shape=(tokens, 3)),
            Input(name="txt_ids", role="setting", dtype="float32", shape=(length, 3)),
            *([guidance] if config.guidance_embeds else []),
        )

    def scheduler_at(self, scheduler: Any, inputs: Sequence[Input]) -> Any:
        """See `Family.scheduler_at`. dev's shift follows the number of tokens."""
        if not self.follows_size(scheduler):
            return scheduler
        shift = self.shift(scheduler, tokens_of(inputs), 0)
        return type(scheduler).from_config({**scheduler.config, "base_shift": shift, "max_shift": shift})

    def shift(self, scheduler: Any, tokens: int, steps: int) -> float:
        """The pipeline's exponential shift for pictures of a number of tokens, and for a number of steps."""
        settings = {**SCHEDULER, **scheduler.config}
        low, high = settings["base_image_seq_len"], settings["max_image_seq_len"]
        slope = (settings["max_shift"] - settings["base_shift"]) / (high - low)
        return float(settings["base_shift"] + slope * (tokens - low))

    def follows_size(self, scheduler: Any) -> bool:
        """See `Family.follows_size`."""
        return bool({**SCHEDULER, **scheduler.config}["use_dynamic_shifting"])

    def set_timesteps(self, scheduler: Any, steps: int, inputs: Sequence[Input]) -> None:
        """See `Family.set_timesteps`."""
        sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=self.shift(scheduler, tokens_of(inputs), steps))

    def sizes(self, height: int, width: int) -> Mapping[str, int]:
        """See `Family.sizes`."""
        return {"tokens": height * width}

    def output_shape(self, config: Any, state: tuple[int, ...]) -> tuple[int, ...]:
        """See `Family.output_shape`."""
        return state

    def embed(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Mapping[str, Any]:
        """See `Family.embed`."""
        encoder = pipeline_of(PIPELINE, **parts, transformer=None, scheduler=None)
        text, pooled, _ = encoder.encode_prompt(list(prompts), max_sequence_length=TOKENS)
        return {STATES: text.float(), POOLED: pooled.float()}

    def encode(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Conditions:
        """See `Family.encode`. There is no null condition: guidance is an input of the network."""
        rows = self.embed(pipeline, parts, prompts, config)
        arrays = {name: tensor.cpu().numpy() for name, tensor in rows.items()}
        return Conditions(names=tuple(prompts), arrays=arrays, null={})

    def latents(self, sampled: Float32, size: tuple[int, int] | None) -> Float32:
        """See `Family.latents`. A token holds a patch of 2 x 2."""
        import torch
        from diffusers import FluxPipeline

        height, width = size or (SIDE, SIDE)
        unpacked: Float32 = FluxPipeline._unpack_latents(torch.from_numpy(sampled), height, width, PIXELS // 2).numpy()
        return unpacked

    def largest_activation(self, model: Any) -> int:
        """The input of a block's last linear: attention and the MLP's inner activation side by side."""
        return int((SIDE // PIXELS) ** 2 * 5 * model.inner_dim)

    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """See `Family.draw`."""
        height, width = pictures.size or (SIDE, SIDE)
        return latents_of(
            pipeline_of(PIPELINE, **dict.fromkeys(PARTS), transformer=network, scheduler=scheduler),
            pictures.noise,
            {"prompt_embeds": pictures.conditions[STATES], "pooled_prompt_embeds": pictures.conditions[POOLED]},
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
        )


def tokens_of(inputs: Sequence[Input]) -> int:
    """Of a picture."""
    return next(axis.size for axis in axes_of(inputs) if axis.name == "tokens")


FLUX = Flux()
