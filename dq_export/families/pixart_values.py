"""What the values of a PixArt's config.json may be."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .config_values import Channels, Positive, Share, Values
from .dit_values import POSITIONS

MICRO_SIZE = 128
"""The sample_size at which diffusers' PixArtAlphaPipeline sends resolution and aspect ratio, and at no other."""


class PixArtValues(Values):
    """Of `PixArtTransformer2DModel`."""

    num_attention_heads: int = Field(16, ge=1, le=1024)
    attention_head_dim: int = Field(72, ge=1, le=4096)
    in_channels: Channels = 4
    out_channels: Channels | None = 8
    num_layers: int = Field(28, ge=1, le=512)
    dropout: Share = 0.0
    norm_num_groups: Channels = 32
    cross_attention_dim: Channels = 1152
    attention_bias: bool = True
    sample_size: int = Field(128, ge=1, le=8192)
    patch_size: int = Field(2, ge=1, le=1024)
    activation_fn: Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"] = "gelu-approximate"
    num_embeds_ada_norm: int = Field(1000, ge=1, le=10_000_000)
    upcast_attention: bool = False
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    norm_elementwise_affine: bool = False
    norm_eps: float = Field(1e-6, gt=0, le=1)
    interpolation_scale: Positive | None = None
    use_additional_conditions: bool | None = None
    caption_channels: Channels | None = None
    attention_type: Literal["default"] | None = "default"

    @model_validator(mode="after")
    def _fit_each_other(self) -> PixArtValues:
        width, side = self.num_attention_heads * self.attention_head_dim, self.sample_size // self.patch_size
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size}: expected a multiple of patch_size {self.patch_size}")
        if width % 4:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} times num_attention_heads {self.num_attention_heads}: expected a "
                "multiple of 4, for sine and cosine of rows and columns"
            )
        if side * side * width > POSITIONS:
            raise ValueError(
                f"sample_size {self.sample_size}: expected at most {POSITIONS // width} patches at width {width}, found {side**2}"
            )
        if self.out_channels not in (None, self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels {self.out_channels}: expected in_channels {self.in_channels}, or twice as many for a learned sigma"
            )
        if self.caption_channels is not None and self.cross_attention_dim != width:
            raise ValueError(
                f"cross_attention_dim {self.cross_attention_dim}: expected {width}, attention_head_dim {self.attention_head_dim} "
                f"times num_attention_heads {self.num_attention_heads}, to which caption_channels are projected"
            )
        if self.use_additional_conditions and self.sample_size != MICRO_SIZE:
            raise ValueError(
                f"use_additional_conditions: diffusers' pipeline sends the resolution at sample_size {MICRO_SIZE} alone, found "
                f"{self.sample_size}"
            )
        if self.use_additional_conditions is not False and self.sample_size == MICRO_SIZE and width % 3:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} times num_attention_heads {self.num_attention_heads}: expected a "
                "multiple of 3, for height, width and aspect ratio"
            )
        return self
