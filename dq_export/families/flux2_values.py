"""The possible values of a FLUX.2's config.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .config_values import Channels, Values
from .flux_values import require_packed


class Flux2Values(Values):
    """The keys of `Flux2Transformer2DModel`, with diffusers' defaults."""

    patch_size: Literal[1] = 1
    in_channels: Channels = 128
    out_channels: Channels | None = None
    num_layers: int = Field(8, ge=1, le=512)
    num_single_layers: int = Field(48, ge=1, le=512)
    attention_head_dim: int = Field(128, ge=1, le=4096)
    num_attention_heads: int = Field(48, ge=1, le=1024)
    joint_attention_dim: Channels = 15_360
    timestep_guidance_channels: int = Field(256, ge=2, le=4096, multiple_of=2)
    mlp_ratio: float = Field(3.0, ge=1, le=64)
    axes_dims_rope: list[int] = Field([32, 32, 32, 32], min_length=4, max_length=4)
    rope_theta: int = Field(2000, ge=1, le=1 << 31)
    eps: float = Field(1e-6, gt=0, le=1)
    guidance_embeds: bool = True

    @model_validator(mode="after")
    def _fit_each_other(self) -> Flux2Values:
        require_packed(self)
        return self
