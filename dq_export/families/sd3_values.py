"""The possible values of a Stable Diffusion 3's config.json."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from .config_values import Channels, Values


class SD3Values(Values):
    """Of `SD3Transformer2DModel`, with diffusers' defaults."""

    buffers_stored: ClassVar[bool] = True  # the position embedding, which takes gigabytes to compute

    sample_size: int = Field(128, ge=1, le=8192)
    patch_size: int = Field(2, ge=1, le=1024)
    in_channels: Channels = 16
    num_layers: int = Field(18, ge=1, le=512)
    attention_head_dim: int = Field(64, ge=1, le=4096)
    num_attention_heads: int = Field(18, ge=1, le=1024)
    joint_attention_dim: Channels = 4096
    caption_projection_dim: int = Field(1152, ge=1, le=1 << 22)
    pooled_projection_dim: Channels = 2048
    out_channels: Channels | None = 16
    pos_embed_max_size: int = Field(96, ge=1, le=4096)
    dual_attention_layers: list[int] = Field([], max_length=512)
    qk_norm: Literal["rms_norm"] | None = None

    @model_validator(mode="after")
    def _streams_fit(self) -> SD3Values:
        heads = f"attention_head_dim {self.attention_head_dim} times num_attention_heads {self.num_attention_heads}"
        width = self.attention_head_dim * self.num_attention_heads
        if self.caption_projection_dim != width:
            raise ValueError(
                f"caption_projection_dim {self.caption_projection_dim}: expected {width}, {heads}: text and picture meet in one "
                "attention"
            )
        if width % 4:
            raise ValueError(f"{heads}: expected a multiple of 4, for sine and cosine of rows and columns")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size}: expected a multiple of patch_size {self.patch_size}")
        if self.sample_size // self.patch_size > self.pos_embed_max_size:
            raise ValueError(
                f"sample_size {self.sample_size}: expected at most {self.pos_embed_max_size * self.patch_size}, "
                f"pos_embed_max_size {self.pos_embed_max_size} patches of {self.patch_size}"
            )
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(f"out_channels {self.out_channels}: expected in_channels {self.in_channels}")
        return self
