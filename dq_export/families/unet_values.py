"""The supported values of a UNet's config.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .config_values import Channels, Positive, Share, Values, require_halved, require_levels

SIZES, SCORED = 6, 5
"""Numbers that XL's pipelines send for a picture: its original size, the corner of its crop, and its size, or for the refiner in
place of that an aesthetic score."""

INPAINTING = (9, 4)
"""Channels that a network of the inpainting pipelines reads (latents, mask, latents of the picture around it) and predicts."""

Count = Annotated[int, Field(ge=1, le=512)]


def is_refiner(config: Any) -> bool:
    """Whether a configuration is that of XL's refiner: one encoder makes its states and its pooled text, of one width."""
    sizes, width = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
    scored = sizes is not None and width == SCORED * sizes + config.cross_attention_dim
    return scored and config.addition_embed_type is not None


def layers_of(config: Any) -> list[int]:
    """The number of layers of each level."""
    layers = config.layers_per_block
    return list(layers) if isinstance(layers, (list, tuple)) else [layers] * len(config.block_out_channels)


def numbers_of(config: Any) -> int:
    """How many numbers about a picture a network of XL takes."""
    return SCORED if is_refiner(config) else SIZES


class LevelValues(Values):
    """Values that `UNet2DConditionModel` and `ControlNetModel`, its first half, share, with diffusers' defaults."""

    in_channels: Channels = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = Field(0, ge=0, le=1)
    down_block_types: list[Literal["CrossAttnDownBlock2D", "DownBlock2D"]] = Field(min_length=1, max_length=8)
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] = "UNetMidBlock2DCrossAttn"
    only_cross_attention: Literal[False] = False
    block_out_channels: list[Channels] = Field([320, 640, 1280, 1280], min_length=1, max_length=8)
    layers_per_block: Count | list[Count] = 2
    downsample_padding: int = Field(1, ge=0, le=1)
    mid_block_scale_factor: Positive = 1.0
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    norm_num_groups: Channels = 32
    norm_eps: float = Field(1e-5, gt=0, le=1)
    cross_attention_dim: Channels = 1280
    transformer_layers_per_block: Count | list[Count] = 1
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: Count | list[Count] = 8
    num_attention_heads: None = None
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_embed_type_num_heads: Count = 64
    addition_time_embed_dim: Count | None = None
    num_class_embeds: None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    projection_class_embeddings_input_dim: Channels | None = None

    @model_validator(mode="after")
    def _levels_fit(self) -> LevelValues:
        levels = len(self.block_out_channels)
        require_levels(self)
        for key in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            numbers = getattr(self, key)
            if isinstance(numbers, list) and len(numbers) != levels:
                raise ValueError(f"{key}: expected a number, or {levels} of them, one for each of block_out_channels")
        heads = self.attention_head_dim if isinstance(self.attention_head_dim, list) else [self.attention_head_dim] * levels
        for width, number in zip(self.block_out_channels, heads, strict=True):
            if width % number:
                raise ValueError(
                    f"block_out_channels {width}: expected a multiple of attention_head_dim {number}, the number of heads"
                )
        return self


class UNetValues(LevelValues):
    """Values of `UNet2DConditionModel`."""

    sample_size: int = Field(ge=1, le=8192)
    out_channels: Channels = 4
    center_input_sample: bool = False
    up_block_types: list[Literal["CrossAttnUpBlock2D", "UpBlock2D"]] = Field(min_length=1, max_length=8)
    dropout: Share = 0.0
    reverse_transformer_layers_per_block: None = None
    dual_cross_attention: Literal[False] = False
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: Positive = 1.0
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Channels | None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: Annotated[int, Field(ge=4, le=16_384)] | None = None
    conv_in_kernel: Literal[1, 3, 5, 7] = 3
    conv_out_kernel: Literal[1, 3, 5, 7] = 3
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: Literal[False] | None = None
    cross_attention_norm: None = None

    @model_validator(mode="after")
    def _sides_fit(self) -> UNetValues:
        require_halved(self)
        return self

    @model_validator(mode="after")
    def _inputs_fit(self) -> UNetValues:
        if self.in_channels != self.out_channels and (self.in_channels, self.out_channels) != INPAINTING:
            raise ValueError(
                f"in_channels {self.in_channels}: expected out_channels {self.out_channels}, or 9 for 4, those of inpainting; a "
                "network that reads other pictures (instructions, depth) is not supported"
            )
        if self.addition_embed_type is None:
            return self
        sizes, width, count = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim, numbers_of(self)
        if sizes is None or width is None or width <= count * sizes or sizes % 2:
            raise ValueError(
                f"projection_class_embeddings_input_dim {width}: expected {count} times addition_time_embed_dim {sizes}, an even "
                "number, and the width of the pooled text"
            )
        return self


class ControlNetValues(LevelValues):
    """Values of `ControlNetModel`, for pipelines that give it a picture in colours, and all of its residuals to the network."""

    in_channels: Literal[4] = 4
    layers_per_block: Count = 2
    conditioning_channels: Literal[3] = 3
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    conditioning_embedding_out_channels: list[Channels] = Field([16, 32, 96, 256], min_length=4, max_length=4)
    global_pool_conditions: Literal[False] = False

    @model_validator(mode="after")
    def _base(self) -> ControlNetValues:
        if is_refiner(self):
            raise ValueError("a ControlNet of XL's refiner, with which no pipeline draws; expected one of XL's base")
        return self
