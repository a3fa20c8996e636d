"""Family `unet`: text to image with diffusers `UNet2DConditionModel`: Stable Diffusion 1 and 2, XL, and LCMs, of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from dq_export.core.network import BATCH, Axis, Conditions, Input

from .embeddings import settle_timesteps
from .family import Family, Pictures
from .reference import Float32
from .stand_in import StandIn
from .torch_blocks import UNET_LISTS
from .unet_pipelines import CONTROLLED, ENCODED_AS, OPTIONAL, PARTS, PIXELS, XL, draw, encoding, task
from .unet_values import UNetValues, is_refiner, layers_of, numbers_of
from .upsampling import settle_upsamplers

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""The scheduler of Stable Diffusion, for a folder without one."""
CONSISTENT = {**SCHEDULER, "_class_name": "LCMScheduler", "set_alpha_to_one": True}
"""The scheduler of a latent consistency model, for a folder without one."""
TOKENS = 77
"""The number of tokens to which CLIP's texts are padded."""
LARGER = 4
"""Greatest height and width of the graph, relative to the checkpoint's."""
INNER = 8
"""Width of a GEGLU's linear, relative to the width of its tokens: two halves of four."""
STATES, POOLED, IDS, ADDED = "encoder_hidden_states", "text_embeds", "time_ids", "added_cond_kwargs"
DOWN, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"


class UNet(Family):
    """Data, and diffusers' own pipelines for prompts and sampling."""

    name = "unet"
    part = "unet"
    controlled = tuple(CONTROLLED.values())
    chain_lists = UNET_LISTS
    architectures = ("UNet2DConditionModel",)
    values = UNetValues
    encoders = PARTS[XL]
    optional = OPTIONAL
    prompt_tokens = dict.fromkeys(ENCODED_AS, TOKENS)
    requests = {STATES: "prompt_embeds", POOLED: "pooled_prompt_embeds"}  # noqa: RUF012
    size_values = {IDS: ("height", "width", 0, 0, "height", "width")}  # noqa: RUF012
    unit = PIXELS
    default_guidance = 7.5  # StableDiffusionPipeline's
    default_scheduler = SCHEDULER

    def prepare(self, model: Any) -> None:
        """See `Family.prepare`."""
        settle_timesteps(model)
        settle_upsamplers(model)

    def scheduler_of(self, config: Any) -> Mapping[str, Any]:
        """See `Family.scheduler_of`."""
        return SCHEDULER if config.time_cond_proj_dim is None else CONSISTENT

    def guided_by(self, config: Any) -> Literal["null", "input", "nothing"]:
        """See `Family.guided_by`. A latent consistency model reads the scale, as sines and cosines."""
        return "null" if config.time_cond_proj_dim is None else "input"

    def task(self, config: Any) -> str:
        """See `Family.task`. Pipelines that inpaint, and the refiner's, start from a picture."""
        return task(config)

    def zero_null(self, config: Any) -> bool:
        """See `Family.zero_null`. XL's pipeline takes zeros where there is no negative prompt, its refiner's does not."""
        return config.addition_embed_type is not None and not is_refiner(config)

    def inputs(self, model: Any) -> tuple[Input, ...]:
        """See `Family.inputs`. XL also takes the pooled text, and numbers about the picture."""
        config = model.config
        size, halved = config.sample_size, 2 ** (len(config.block_out_channels) - 1)
        height, width = (Axis(name, size, LARGER * size, halved) for name in ("height", "width"))
        text = (BATCH, Axis("length", TOKENS), config.cross_attention_dim)
        inputs = [
            Input(name="sample", role="state", dtype="float32", shape=(BATCH, config.in_channels, height, width)),
            Input(name="timestep", role="timestep", dtype="float32"),
            Input(name=STATES, role="condition", dtype="float32", shape=text),
        ]
        if config.time_cond_proj_dim is not None:
            scale = (BATCH, config.time_cond_proj_dim)
            inputs.append(Input(name="timestep_cond", role="setting", dtype="float32", shape=scale))
        if config.addition_embed_type is not None:
            count = numbers_of(config)
            pooled = (BATCH, config.projection_class_embeddings_input_dim - count * config.addition_time_embed_dim)
            inputs.append(Input(name=POOLED, role="condition", dtype="float32", shape=pooled, within=ADDED))
            inputs.append(Input(name=IDS, role="setting", dtype="float32", shape=(BATCH, count), within=ADDED))
        return tuple(inputs)

    def residuals(self, model: Any) -> tuple[Input, ...]:
        """See `Family.residuals`. One for the first convolution, each layer, and each halving of the height and the width."""
        config, (_, _, *sides) = model.config, self.inputs(model)[0].shape
        widths = config.block_out_channels
        sums = [(widths[0], 1)]
        for level, (width, layers) in enumerate(zip(widths, layers_of(config), strict=True)):
            sums += [(width, 2**level)] * layers
            sums += [(width, 2 ** (level + 1))] if level < len(widths) - 1 else []
        sums.append(sums[-1])

        def one(number: int, width: int, divisor: int) -> Input:
            last = number == len(sums) - 1
            name, within = (MIDDLE, "") if last else (f"{DOWN}_{number}", DOWN)
            parts = (replace(side, divisor=divisor) for side in sides if isinstance(side, Axis))
            return Input(name=name, role="residual", dtype="float32", shape=(BATCH, width, *parts), within=within)

        return tuple(one(number, *sum_of) for number, sum_of in enumerate(sums))

    def embed(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Mapping[str, Any]:
        """See `Family.embed`."""
        kind = ENCODED_AS[pipeline]
        options = {"device": parts[PARTS[kind][-1]].device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        encoded = encoding(pipeline, parts).encode_prompt(list(prompts), **options)
        names = (STATES, POOLED) if kind == XL else (STATES,)
        return {name: tensor.float() for name, tensor in zip(names, encoded[::2], strict=True)}

    def encode(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Conditions:
        """See `Family.encode`. XL's null condition is zeros, as in its pipeline; latent consistency models have none."""
        encoded = super().encode(pipeline, parts, prompts, config)
        null = {name: np.zeros_like(rows) if self.zero_null(config) else rows for name, rows in encoded.null.items()}
        guided = self.guided_by(config) == "null"
        return Conditions(names=encoded.names, arrays=encoded.arrays, null=null if guided else {})

    def largest_activation(self, model: Any) -> int:
        """See `Family.largest_activation`. It is the input of the first level's GEGLU."""
        return int(INNER * model.config.block_out_channels[0] * model.config.sample_size**2)

    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """See `Family.draw`. With guidance > 1 a feed holds every sample twice: without its prompt, then with it."""
        prompts = {self.requests[name]: rows for name, rows in pictures.conditions.items()}
        if guidance > 1:
            prompts |= {f"negative_{self.requests[name]}": rows for name, rows in pictures.null.items()}
        return draw(network, scheduler, pictures, prompts, steps=steps, guidance=guidance)


UNET = UNet()
