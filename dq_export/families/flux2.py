"""Family `flux2`: text to image with diffusers `Flux2Transformer2DModel`: FLUX.2 dev and klein, of any size."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dq_export.core.network import BATCH, Axis, Input

from .family import Pictures
from .flux import LONGEST, PIXELS, SCHEDULER, SIDE, Flux, tokens_of
from .flux2_values import Flux2Values
from .pipelines import pipeline_of
from .reference import Float32
from .stand_in import StandIn

DEV, KLEIN = "Flux2Pipeline", "Flux2KleinPipeline"
TOKENS = 512
"""The number of tokens to which both pipelines fill every text up."""
AXES = 4
"""The numbers of a position: picture, row, column, place in the text."""
STATES = "encoder_hidden_states"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Klein's prompt. Source: Qwen3's chat template without thinking. Templates are programs, and a checkpoint's never run."""


class Flux2(Flux):
    """The family's data; prompts and sampling are those of diffusers' own pipelines. The rest is as in FLUX.1."""

    name = "flux2"
    architectures = ("Flux2Transformer2DModel",)
    values = Flux2Values
    encoders = ("tokenizer", "text_encoder")
    requests = {STATES: "prompt_embeds"}  # noqa: RUF012
    template = CHAT
    picture_positions = {"img_ids": ("zero", "row", "column", "zero")}  # noqa: RUF012
    text_positions = {"txt_ids": ("zero", "zero", "zero", "place")}  # noqa: RUF012
    packing = 1
    prompt_tokens = {DEV: TOKENS, KLEIN: TOKENS}  # noqa: RUF012
    default_guidance = 4.0  # dev's pipeline's

    def scheduler_of(self, config: Any) -> Mapping[str, Any]:
        """See `Family.scheduler_of`."""
        return SCHEDULER

    def inputs(self, model: Any) -> tuple[Input, ...]:
        """See `Family.inputs`. The pipelines send positions for every picture, and the network reads those of the first."""
        config = model.config
        tokens, length = Axis("tokens", (SIDE // PIXELS) ** 2, (LONGEST // PIXELS) ** 2), Axis("length", TOKENS)
        guidance = Input(name="guidance", role="setting", dtype="float32")
        return (
            Input(name="hidden_states", role="state", dtype="float32", shape=(BATCH, tokens, config.in_channels)),
            Input(name="timestep", role="timestep", dtype="float32"),
            Input(name=STATES, role="condition", dtype="float32", shape=(BATCH, length, config.joint_attention_dim)),
            Input(name="img_ids", role="setting", dtype="float32", shape=(BATCH, tokens, AXES)),
            Input(name="txt_ids", role="setting", dtype="float32", shape=(BATCH, length, AXES)),
            *([guidance] if config.guidance_embeds else []),
        )

    def scheduler_at(self, scheduler: Any, inputs: Sequence[Input]) -> Any:
        """See `Family.scheduler_at`. The pipelines' shift follows the number of tokens and of steps."""
        if not self.follows_size(scheduler):
            return scheduler
        fixed, tokens = copy.deepcopy(scheduler), tokens_of(inputs)
        method = fixed.set_timesteps

        @functools.wraps(method)  # the pipelines look at its arguments
        def set_timesteps(*args: Any, sigmas: Any, mu: float, **options: Any) -> None:
            method(*args, sigmas=sigmas, mu=self.shift(scheduler, tokens, len(sigmas)), **options)

        fixed.set_timesteps = set_timesteps
        return fixed

    def shift(self, scheduler: Any, tokens: int, steps: int) -> float:
        """See `Flux.shift`."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps))

    def embed(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Mapping[str, Any]:
        """See `Family.embed`. For klein only."""
        import torch

        tokenizer, encoder = _Chat(parts["tokenizer"], self), parts["text_encoder"]
        encoder.lm_head = torch.nn.Identity()  # logits of all words take gigabytes, and nothing reads them
        whole = pipeline_of(KLEIN, tokenizer=tokenizer, text_encoder=encoder, transformer=None, scheduler=None)
        text, _ = whole.encode_prompt(list(prompts), max_sequence_length=TOKENS)
        return {STATES: text.float()}

    def latents(self, sampled: Float32, size: tuple[int, int] | None) -> Float32:
        """See `Family.latents`. A token's channels are those of 2 x 2 latents, which the VAE unpacks."""
        height, width = size or (SIDE, SIDE)
        places: Float32 = sampled.transpose(0, 2, 1).reshape(len(sampled), -1, height // PIXELS, width // PIXELS)
        return places

    def largest_activation(self, model: Any) -> int:
        """The output of a block's first linear: query, key, value, and both halves of the MLP's inner activation."""
        return int((SIDE // PIXELS) ** 2 * (3 + 2 * model.config.mlp_ratio) * model.inner_dim)

    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """See `Family.draw`. The pipelines take latents laid out as pictures; klein's returns them so, in the VAE's scaling."""
        import torch

        height, width = pictures.size or (SIDE, SIDE)
        kind, scale = (DEV, guidance) if network.config["guidance_embeds"] else (KLEIN, 1.0)
        parts = {"tokenizer": None, "text_encoder": None, "transformer": network, "scheduler": scheduler}
        pipeline = pipeline_of(kind, **parts)
        pipeline.vae = _unscaled(pictures.noise.shape[-1])
        noise = torch.from_numpy(pictures.noise).transpose(1, 2)
        result = pipeline(
            latents=noise.unflatten(2, (height // PIXELS, width // PIXELS)),
            prompt_embeds=torch.from_numpy(pictures.conditions[STATES]),
            num_inference_steps=steps,
            guidance_scale=scale,
            height=height,
            width=width,
            output_type="latent",
        ).images
        packed = result if kind == DEV else pipeline._pack_latents(pipeline._patchify_latents(result))
        latents: Float32 = packed.numpy()
        return latents


@dataclass(frozen=True)
class _Chat:
    """Replaces klein's tokenizer; it writes prompts without the checkpoint's chat template."""

    tokenizer: Any
    family: Flux2

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """The text of a prompt."""
        return self.family.written(messages[0]["content"])

    def __call__(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, **options)


def _unscaled(channels: int) -> Any:
    """Replaces a VAE; its statistics of latents change nothing."""
    import torch

    statistics = SimpleNamespace(running_mean=torch.zeros(channels), running_var=torch.ones(channels))
    return SimpleNamespace(bn=statistics, config=SimpleNamespace(batch_norm_eps=0.0))


FLUX2 = Flux2()
