"""A tiny FLUX.2 klein pipeline: two blocks of two streams and two of one, and a Qwen3 of 28 blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sd3 import noisy
from toy import PROMPTS

from dq_export.core.network import Float32
from dq_export.families.reference import Reference

TEXT = 4
"""Width of the text encoder, three of whose blocks give the network's text."""
TINY = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * TEXT,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": [4, 4, 4, 4],
    "guidance_embeds": False,
}
SIDE = (64, 96)
"""Height and width of its pictures in pixels: 4 x 6 tokens."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""What Qwen3's own makes of messages without tools."""


def save_flux2(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny pipeline folder with seeded random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**{**TINY, **changes})
    noisy(model)
    model.to(dtype).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    save_qwen(folder)
    parts = {"tokenizer": ["transformers", "Qwen2TokenizerFast"], "text_encoder": ["transformers", "Qwen3ForCausalLM"]}
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True, **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def save_qwen(folder: Path) -> None:
    """A Qwen3, and its tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=TEMPLATE)
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(1)
    sizes = {"hidden_size": TEXT, "intermediate_size": 8, "head_dim": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(vocabulary), num_hidden_layers=28, tie_word_embeddings=True, **sizes))
    noisy(encoder)
    encoder.save_pretrained(folder / "text_encoder")


def flux2_pipeline(folder: Path, transformer: Any = None) -> Any:
    """diffusers' own pipeline of a folder; of dev, without a text encoder."""
    import diffusers
    import transformers

    network_class = diffusers.Flux2Transformer2DModel
    parts: dict[str, Any] = {
        "transformer": network_class.from_pretrained(folder / "transformer").eval() if transformer is None else transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    }
    if parts["transformer"].config["guidance_embeds"]:
        pipeline = diffusers.Flux2Pipeline(vae=None, tokenizer=None, text_encoder=None, **parts)
    else:
        tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(folder / "tokenizer")
        encoder = transformers.Qwen3ForCausalLM.from_pretrained(folder / "text_encoder").eval()
        pipeline = diffusers.Flux2KleinPipeline(vae=None, tokenizer=tokenizer, text_encoder=encoder, is_distilled=True, **parts)
    pipeline.vae = diffusers.AutoencoderKLFlux2(
        latent_channels=2, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, batch_norm_eps=0.0,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_flux2_pipeline(folder: Path, reference: Reference, chosen: Any, guidance: float, seed: int) -> Float32:
    """From the prompts' texts; the latents as the network samples them."""
    height, width = SIDE
    latents: list[torch.Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, values: Any) -> Any:
        latents.append(values["latents"])
        return {}

    noise = torch.from_numpy(reference.noise(len(chosen), seed)).transpose(1, 2)
    flux2_pipeline(folder)(
        prompt=[PROMPTS[index] for index in chosen],
        num_inference_steps=4,
        guidance_scale=guidance,
        height=height,
        width=width,
        latents=noise.unflatten(2, (height // 16, width // 16)),
        callback_on_step_end=keep,
        output_type="latent",
    )
    return np.asarray(latents[-1])
