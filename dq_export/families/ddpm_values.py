"""The supported values of a DDPM's config.json."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .config_values import Channels, Positive, Share, Values, require_halved, require_levels

Down = Literal["DownBlock2D", "AttnDownBlock2D"]
Up = Literal["UpBlock2D", "AttnUpBlock2D"]


class DDPMValues(Values):
    """Values of `UNet2DModel`, with diffusers' defaults."""

    sample_size: int = Field(ge=1, le=8192)
    in_channels: Channels = 3
    out_channels: Channels = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Channels | None = None
    freq_shift: int = Field(0, ge=0, le=1)
    flip_sin_to_cos: bool = True
    down_block_types: list[Down] = Field(
        ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"], min_length=1, max_length=8
    )
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    up_block_types: list[Up] = Field(["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"], min_length=1, max_length=8)
    block_out_channels: list[Channels] = Field([224, 448, 672, 896], min_length=1, max_length=8)
    layers_per_block: int = Field(2, ge=1, le=64)
    mid_block_scale_factor: Positive = 1.0
    downsample_padding: int = Field(1, ge=0, le=1)
    downsample_type: Literal["conv"] = "conv"
    upsample_type: Literal["conv"] = "conv"
    dropout: Share = 0.0
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    attention_head_dim: Annotated[int, Field(ge=1, le=4096)] | None = 8
    norm_num_groups: Channels = 32
    attn_norm_num_groups: Channels | None = None
    norm_eps: float = Field(1e-5, gt=0, le=1)
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: None = None
    num_class_embeds: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    num_train_timesteps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None

    @model_validator(mode="after")
    def _fit_each_other(self) -> DDPMValues:
        require_levels(self)
        require_halved(self)
        attends = self.add_attention or any("Attn" in kind for kind in (*self.down_block_types, *self.up_block_types))
        if attends and self.attention_head_dim is not None:
            for width in self.block_out_channels:
                if width % self.attention_head_dim:
                    raise ValueError(
                        f"block_out_channels {width}: expected a multiple of attention_head_dim {self.attention_head_dim}, the "
                        "width of a head"
                    )
        if self.attn_norm_num_groups is not None and self.block_out_channels[-1] % self.attn_norm_num_groups:
            raise ValueError(
                f"block_out_channels {self.block_out_channels[-1]}: expected a multiple of attn_norm_num_groups "
                f"{self.attn_norm_num_groups}"
            )
        if self.in_channels != self.out_channels:
            raise ValueError(
                f"in_channels {self.in_channels}: expected out_channels {self.out_channels}; a network that also reads another "
                "picture, or predicts a variance, is not supported"
            )
        return self
