"""Upsampling for graphs with any number of samples."""

from __future__ import annotations

from typing import Any


def settle_upsamplers(model: Any) -> None:
    """Remove diffusers' branch for 64 samples or more, which changes only the memory layout and limits a traced graph to 63."""
    import torch
    from diffusers.models.upsampling import Upsample2D

    class Doubled(Upsample2D):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, output_size: None = None) -> torch.Tensor:
            doubled = torch.nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
            return self.conv(doubled) if self.use_conv else doubled

    for module in model.modules():
        if type(module) is Upsample2D:
            module.__class__ = Doubled
