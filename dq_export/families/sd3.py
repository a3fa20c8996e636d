"""Family `sd3`: text to image with diffusers `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5, of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dq_export.core.network import BATCH, Axis, Input

from .embeddings import settle_timesteps
from .family import Family, Pictures
from .pipelines import latents_of, pipeline_of
from .prediction import FLOW
from .reference import Float32
from .sd3_values import SD3Values
from .stand_in import StandIn

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
"""Stable Diffusion 3's own, for a folder without a scheduler."""
PIPELINE = "StableDiffusion3Pipeline"
TOKENS, CLIP_TOKENS = 256, 77
"""That the pipeline fills every text up to: for T5, and in front of it for both CLIP encoders."""
PIXELS = 8
"""Of a latent, along an axis. Source: the pipeline's `vae_scale_factor` without a VAE."""
STATES, POOLED = "encoder_hidden_states", "pooled_projections"
PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")


class SD3(Family):
    """Data, and diffusers' own pipeline for prompts and sampling."""

    name = "sd3"
    architectures = ("SD3Transformer2DModel",)
    values = SD3Values
    encoders = PARTS
    optional = {PIPELINE: ("tokenizer_3", "text_encoder_3")}  # noqa: RUF012
    prompt_tokens = {PIPELINE: TOKENS}  # noqa: RUF012
    requests = {STATES: "prompt_embeds", POOLED: "pooled_prompt_embeds"}  # noqa: RUF012
    blocks = ("transformer_blocks",)
    prediction = FLOW
    unit = PIXELS
    default_guidance = 7.0  # the pipeline's
    default_scheduler = SCHEDULER

    def prepare(self, model: Any) -> None:
        """See `Family.prepare`."""
        settle_timesteps(model)

    def inputs(self, model: Any) -> tuple[Input, ...]:
        """See `Family.inputs`. Pictures may be as large as the table of positions."""
        config = model.config
        height, width = (
            Axis(name, config.sample_size, config.pos_embed_max_size * config.patch_size, config.patch_size)
            for name in ("height", "width")
        )
        length = Axis("length", CLIP_TOKENS + TOKENS)
        return (
            Input(name="hidden_states", role="state", dtype="float32", shape=(BATCH, config.in_channels, height, width)),
            Input(name="timestep", role="timestep", dtype="float32"),
            Input(name=STATES, role="condition", dtype="float32", shape=(BATCH, length, config.joint_attention_dim)),
            Input(name=POOLED, role="condition", dtype="float32", shape=(BATCH, config.pooled_projection_dim)),
        )

    def embed(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Mapping[str, Any]:
        """See `Family.embed`. Without T5 there are zeros in the place of its states, as diffusers has it."""
        network = _Described(config)
        encoder = pipeline_of(PIPELINE, **{**dict.fromkeys(PARTS), **parts}, transformer=network, scheduler=None)
        text, _, pooled, _ = encoder.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {STATES: text.float(), POOLED: pooled.float()}

    def largest_activation(self, model: Any) -> int:
        """The MLP's inner one."""
        tokens = (model.config.sample_size // model.config.patch_size) ** 2
        return int(tokens * 4 * model.inner_dim)

    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """See `Family.draw`. With guidance > 1 a feed holds every sample twice: without its prompt, then with it."""
        prompts = {"prompt_embeds": pictures.conditions[STATES], "pooled_prompt_embeds": pictures.conditions[POOLED]}
        if guidance > 1:
            null = {"negative_prompt_embeds": pictures.null[STATES], "negative_pooled_prompt_embeds": pictures.null[POOLED]}
            prompts |= null
        height, width = (PIXELS * size for size in pictures.noise.shape[-2:])
        return latents_of(
            pipeline_of(PIPELINE, **dict.fromkeys(PARTS), transformer=network, scheduler=scheduler),
            pictures.noise,
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
        )


@dataclass(frozen=True)
class _Described:
    """In the network's place where prompts are encoded: the pipeline asks it for the text's width."""

    config: Any


SD3_FAMILY = SD3()
