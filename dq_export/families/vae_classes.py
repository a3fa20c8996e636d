"""The classes of VAE that are decoded, and how each takes latents as a network samples them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import CONFIG
from .config_values import values_of
from .loading import read_config
from .vae_values import Flux2VaeValues, KlValues, VaeValues


@dataclass(frozen=True)
class VaeClass:
    """A class of diffusers."""

    name: str
    values: type[VaeValues]
    patch: int
    """Rows and columns of the VAE's latents that the network samples as channels of one place."""
    unscale: Callable[[Any, Any], Any]
    """Called with a VAE and the network's latents [N, C, h, w]: the latents that `decode` takes,
    [N, C / patch^2, h * patch, w * patch]."""

    def channels(self, values: VaeValues) -> int:
        """C of the network's latents."""
        return values.latent_channels * self.patch**2

    def pixels(self, values: VaeValues) -> int:
        """Pixels along a side of the picture for one place of the network's latents."""
        return int(self.patch * 2 ** (len(values.block_out_channels) - 1))


def _kl(model: Any, latents: Any) -> Any:
    """Statistics by channel go before a shift, as in XL's pipeline."""
    import torch

    config = model.config
    scale, shift = 1 / float(config.scaling_factor), float(config.shift_factor or 0.0)
    mean, std = config.latents_mean, config.latents_std
    if mean is not None and std is not None:
        scale, shift = (torch.tensor(values).view(1, -1, 1, 1) for values in ([scale * value for value in std], mean))
    return latents * scale + shift


def _flux2(model: Any, latents: Any) -> Any:
    """The statistics are those of the patches' channels, which a batch norm has stored."""
    import torch

    mean, variance = (value.view(1, -1, 1, 1) for value in (model.bn.running_mean, model.bn.running_var))
    scaled = latents * torch.sqrt(variance + model.config.batch_norm_eps) + mean
    return torch.nn.functional.pixel_shuffle(scaled, FLUX2.patch)


KL = VaeClass("AutoencoderKL", KlValues, 1, _kl)
FLUX2 = VaeClass("AutoencoderKLFlux2", Flux2VaeValues, 2, _flux2)
CLASSES = (KL, FLUX2)


def class_of(config: Mapping[str, Any]) -> VaeClass | None:
    """The class that a configuration names; None if it is not decoded."""
    return next((item for item in CLASSES if item.name == config.get("_class_name")), None)


def read_vae(vae: Path) -> tuple[VaeClass, VaeValues] | None:
    """Class and values of a VAE's folder; None for a class that is not decoded.

    Raises:
        ModelError: the configuration is damaged, or a value is wrong.
    """
    config = read_config(vae / CONFIG)
    kind = class_of(config)
    return None if kind is None else (kind, values_of(kind.values, config, vae / CONFIG))
