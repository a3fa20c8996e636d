"""The possible values of a VAE's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .config_values import Channels, Positive, Values, require_levels

DownBlock = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
UpBlock = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]


class VaeValues(Values):
    """Of every class."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    down_block_types: list[DownBlock] = Field(["DownEncoderBlock2D"], min_length=1, max_length=8)
    up_block_types: list[UpBlock] = Field(["UpDecoderBlock2D"], min_length=1, max_length=8)
    block_out_channels: list[Channels] = Field([64], min_length=1, max_length=8)
    layers_per_block: int = Field(1, ge=1, le=32)
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    latent_channels: Channels = 4
    norm_num_groups: Channels = 32
    sample_size: int | list[int] | None = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def decoder_widths(self) -> list[int]:
        """Channels of the decoder's levels, the picture's first."""
        return self.block_out_channels


class KlValues(VaeValues):
    """Of `AutoencoderKL`."""

    scaling_factor: float = Field(0.18215, gt=1e-6, le=1e6)
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[Positive] | None = None
    force_upcast: bool = True

    @model_validator(mode="after")
    def _fit_each_other(self) -> KlValues:
        require_levels(self)
        for key in ("latents_mean", "latents_std"):
            values = getattr(self, key)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{key}: expected {self.latent_channels} numbers, one for each of latent_channels")
        return self


class Flux2VaeValues(VaeValues):
    """Of `AutoencoderKLFlux2`."""

    down_block_types: list[DownBlock] = Field(["DownEncoderBlock2D"] * 4, min_length=1, max_length=8)
    up_block_types: list[UpBlock] = Field(["UpDecoderBlock2D"] * 4, min_length=1, max_length=8)
    block_out_channels: list[Channels] = Field([128, 256, 512, 512], min_length=1, max_length=8)
    decoder_block_out_channels: list[Channels] | None = Field(None, min_length=1, max_length=8)
    layers_per_block: int = Field(2, ge=1, le=32)
    latent_channels: Channels = 32
    sample_size: int | list[int] = 1024
    batch_norm_eps: float = Field(1e-4, ge=0, le=1)
    batch_norm_momentum: float | None = Field(0.1, ge=0, le=1)
    patch_size: tuple[Literal[2], Literal[2]] = Field((2, 2), strict=False)

    @model_validator(mode="after")
    def _fit_each_other(self) -> Flux2VaeValues:
        require_levels(self)
        widths = self.decoder_widths
        if len(widths) != len(self.block_out_channels):
            raise ValueError(f"decoder_block_out_channels: expected {len(self.block_out_channels)} of them")
        if wrong := [width for width in widths if width % self.norm_num_groups]:
            raise ValueError(
                f"decoder_block_out_channels {wrong[0]}: expected a multiple of norm_num_groups {self.norm_num_groups}"
            )
        return self

    @property
    def decoder_widths(self) -> list[int]:
        """See `VaeValues.decoder_widths`."""
        return self.decoder_block_out_channels or self.block_out_channels
