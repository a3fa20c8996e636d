"""The possible values of a PixArt's config.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .config_values import Channels, Positive
from .patch_values import PatchValues

MICRO_SIZE = 128
"""The sample_size at which diffusers' PixArtAlphaPipeline sends resolution and aspect ratio, and at no other."""


class PixArtValues(PatchValues):
    """Of `PixArtTransformer2DModel`."""

    out_channels: Channels | None = 8
    cross_attention_dim: Channels = 1152
    sample_size: int = Field(128, ge=1, le=8192)
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    norm_eps: float = Field(1e-6, gt=0, le=1)
    interpolation_scale: Positive | None = None
    use_additional_conditions: bool | None = None
    caption_channels: Channels | None = None
    attention_type: Literal["default"] | None = "default"

    @model_validator(mode="after")
    def _text_and_sizes_fit(self) -> PixArtValues:
        if self.caption_channels is not None and self.cross_attention_dim != self.width:
            raise ValueError(
                f"cross_attention_dim {self.cross_attention_dim}: expected {self.width}, attention_head_dim "
                f"{self.attention_head_dim} times num_attention_heads {self.num_attention_heads}, to which "
                "caption_channels are projected"
            )
        if self.use_additional_conditions and self.sample_size != MICRO_SIZE:
            raise ValueError(
                f"use_additional_conditions: diffusers' pipeline sends the resolution at sample_size {MICRO_SIZE} alone, found "
                f"{self.sample_size}"
            )
        if self.use_additional_conditions is not False and self.sample_size == MICRO_SIZE and self.width % 3:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} times num_attention_heads {self.num_attention_heads}: expected a "
                "multiple of 3, for height, width and aspect ratio"
            )
        return self
