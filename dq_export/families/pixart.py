"""Family `pixart`: text to image with diffusers `PixArtTransformer2DModel`, alpha and Sigma, of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dq_export.core.network import BATCH, Axis, Input

from .embeddings import Positions, settle_timesteps
from .family import Family, Pictures
from .pipelines import latents_of, pipeline_of
from .pixart_values import MICRO_SIZE, PixArtValues
from .reference import Float32
from .sampling import set_steps
from .stand_in import StandIn

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
}
"""PixArt's own scheduler, for a folder without one."""
ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
TOKENS = {ALPHA: 120, SIGMA: 300}
"""The number of tokens to which a pipeline pads every text."""
LARGER = 4
"""The greatest height and width of the graph relative to the checkpoint's; the pipelines' longest formats are twice as long."""
PIXELS = 8
"""Pixels per latent along an axis. Source: the pipelines' `vae_scale_factor` without a VAE."""
STATES, MASK, SIZES = "encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs"


class PixArt(Family):
    """Data, and diffusers' own pipelines for prompts and sampling."""

    name = "pixart"
    architectures = ("PixArtTransformer2DModel",)
    values = PixArtValues
    encoders = ("tokenizer", "text_encoder")
    prompt_tokens = TOKENS
    lowercase = True
    requests = {STATES: "prompt_embeds", MASK: "prompt_attention_mask"}  # noqa: RUF012
    size_values = {"resolution": ("height", "width"), "aspect_ratio": ("aspect",)}  # noqa: RUF012
    blocks = ("transformer_blocks",)
    unit = PIXELS
    default_guidance = 4.5  # the pipelines'
    default_scheduler = SCHEDULER

    def prepare(self, model: Any) -> None:
        """See `Family.prepare`."""
        settle_timesteps(model)
        model.pos_embed.pos_embed = None
        model.pos_embed.register_forward_hook(Positions(model.pos_embed, model.inner_dim))
        # The blocks reshape the modulation to [batch, 6, width]; the modulation of one timestep for all samples is too small.
        model.adaln_single.emb.register_forward_hook(_repeated, with_kwargs=True)

    def inputs(self, model: Any) -> tuple[Input, ...]:
        """See `Family.inputs`. Alpha at 1024 pixels takes the picture's size, too."""
        config = model.config
        height, width = (
            Axis(name, config.sample_size, LARGER * config.sample_size, config.patch_size) for name in ("height", "width")
        )
        length, channels = Axis("length", TOKENS[SIGMA]), config.caption_channels or config.cross_attention_dim
        sizes = (_condition("resolution", 2, within=SIZES), _condition("aspect_ratio", 1, within=SIZES))
        return (
            Input(name="hidden_states", role="state", dtype="float32", shape=(BATCH, config.in_channels, height, width)),
            Input(name="timestep", role="timestep", dtype="int64"),
            _condition(STATES, length, channels),
            _condition(MASK, length),
            *(sizes if model.use_additional_conditions else ()),
        )

    def embed(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Mapping[str, Any]:
        """See `Family.embed`. As the pipeline does it; prompts are not cleaned, which needs more libraries."""
        import torch

        encoder = pipeline_of(pipeline, **parts, transformer=None, scheduler=None)
        states, mask, _, _ = encoder.encode_prompt(list(prompts), False, max_sequence_length=TOKENS[pipeline])
        # For the networks that take them: a picture's size is not that of its prompt.
        sizes = {
            "resolution": torch.full((len(prompts), 2), float(MICRO_SIZE * PIXELS)),
            "aspect_ratio": torch.ones(len(prompts), 1),
        }
        return {STATES: states.float(), MASK: mask.float(), **sizes}

    def largest_activation(self, model: Any) -> int:
        """The inner activation of the MLP."""
        tokens = (model.config.sample_size // model.config.patch_size) ** 2
        return int(tokens * 4 * model.inner_dim)

    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """See `Family.draw`. With guidance > 1 a feed holds every sample twice: without its prompt, then with it."""
        import torch

        set_steps(scheduler, steps)
        alpha = any(item.name == "resolution" for item in network.inputs)  # only that pipeline sends it
        parts = {"tokenizer": None, "text_encoder": None, "transformer": network, "scheduler": scheduler}
        prompts = {"prompt_embeds": pictures.conditions[STATES], "prompt_attention_mask": pictures.conditions[MASK]}
        if guidance > 1:
            null = {"negative_prompt_embeds": pictures.null[STATES], "negative_prompt_attention_mask": pictures.null[MASK]}
            prompts |= null
        height, width = (PIXELS * size for size in pictures.noise.shape[-2:])
        return latents_of(
            pipeline_of(ALPHA if alpha else SIGMA, **parts),
            pictures.noise,
            prompts,
            negative_prompt=None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(0),
            use_resolution_binning=False,
        )


def _condition(name: str, *sizes: int | Axis, within: str = "") -> Input:
    return Input(name=name, role="condition", dtype="float32", shape=(BATCH, *sizes), within=within)


def _repeated(module: Any, inputs: Any, arguments: Mapping[str, Any], embedding: Any) -> Any:
    return embedding.expand(arguments["batch_size"], -1)


PIXART = PixArt()
