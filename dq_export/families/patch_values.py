"""The possible values in config.json of a network of square patches: DiT or PixArt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .config_values import Channels, Share, Values

POSITIONS = 2**25
"""The greatest size of a position embedding, which is computed when a network is created: 170 x 170 patches of width 1152."""


class PatchValues(Values):
    """Keys that both have, with DiT's defaults."""

    num_attention_heads: int = Field(16, ge=1, le=1024)
    attention_head_dim: int = Field(72, ge=1, le=4096)
    in_channels: Channels = 4
    out_channels: Channels | None = None
    num_layers: int = Field(28, ge=1, le=512)
    dropout: Share = 0.0
    norm_num_groups: Channels = 32
    attention_bias: bool = True
    sample_size: int = Field(32, ge=1, le=8192)
    patch_size: int = Field(2, ge=1, le=1024)
    activation_fn: Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"] = "gelu-approximate"
    num_embeds_ada_norm: int = Field(1000, ge=1, le=10_000_000)
    upcast_attention: bool = False
    norm_elementwise_affine: bool = False
    norm_eps: float = Field(1e-5, gt=0, le=1)

    @property
    def width(self) -> int:
        """Of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @model_validator(mode="after")
    def _patches_fit(self) -> PatchValues:
        width, side = self.width, self.sample_size // self.patch_size
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
        return self
