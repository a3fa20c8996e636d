"""The possible values of a FLUX's config.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .config_values import Channels, Values


class FluxValues(Values):
    """The keys of `FluxTransformer2DModel`, with diffusers' defaults."""

    patch_size: Literal[1] = 1
    in_channels: Channels = 64
    out_channels: Channels | None = None
    num_layers: int = Field(19, ge=1, le=512)
    num_single_layers: int = Field(38, ge=1, le=512)
    attention_head_dim: int = Field(128, ge=1, le=4096)
    num_attention_heads: int = Field(24, ge=1, le=1024)
    joint_attention_dim: Channels = 4096
    pooled_projection_dim: Channels = 768
    guidance_embeds: bool = False
    axes_dims_rope: list[int] = Field([16, 56, 56], min_length=3, max_length=3)

    @model_validator(mode="after")
    def _fit_each_other(self) -> FluxValues:
        require_packed(self)
        return self


def require_packed(values: Any) -> None:
    """Raise ValueError unless rotations fit the heads of a FLUX, and its output fits the patches that it reads."""
    axes = values.axes_dims_rope
    if any(size < 2 or size % 2 for size in axes) or sum(axes) != values.attention_head_dim:
        raise ValueError(
            f"axes_dims_rope {axes}: expected even numbers whose sum is attention_head_dim {values.attention_head_dim}"
        )
    if values.in_channels % 4:
        raise ValueError(f"in_channels {values.in_channels}: expected a multiple of 4, the latents of a patch of 2 by 2")
    if values.out_channels not in (None, values.in_channels):
        raise ValueError(
            f"out_channels {values.out_channels}: expected in_channels {values.in_channels}; networks that also read a mask or "
            "another picture are not supported"
        )
