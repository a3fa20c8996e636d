"""A latent checkpoint's VAE decoder as an ONNX file, for a server that is to give pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from .checkpoint import broken_weights
from .float_graph import trace
from .reference import ModelError

ARCHITECTURE = "AutoencoderKL"


def export_decoder(vae: Path, shape: tuple[int, ...], path: Path) -> str:
    """Write `latents` float32[B, C, h, w] -> `sample` float32[B, 3, H, W] in [-1, 1], the latents' scaling undone first.

    Args:
        vae: a diffusers folder.
        shape: (C, h, w).

    Returns:
        Empty, or why this one is not exported: it is a pickle, or another architecture.

    Raises:
        ModelError: damaged.
    """
    import torch
    from diffusers import AutoencoderKL

    if not any(vae.glob("*.safetensors")):
        return f"{vae} has no safetensors, and pickles are not read: latents alone"
    config = AutoencoderKL.load_config(vae)
    if config.get("_class_name") != ARCHITECTURE or config.get("latent_channels") != shape[0]:
        return f"{vae} is no {ARCHITECTURE} of {shape[0]} channels: latents alone"
    try:
        model = AutoencoderKL.from_pretrained(vae, use_safetensors=True, torch_dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{vae}: the VAE cannot be loaded ({str(error).splitlines()[0]}); copy or download it again") from error
    if broken_weights(model):
        raise ModelError(f"{vae}: NaN or Inf in the VAE's weights; the checkpoint is damaged")
    batch = torch.export.Dim("batch", min=1, max=1024)
    graph = trace(_wrapped(model), (torch.zeros(2, *shape),), ["latents"], "sample", {"latents": {0: batch}})
    path.parent.mkdir(parents=True)
    ir.save(graph, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    return ""


def _wrapped(model: Any) -> Any:
    import torch

    factor, shift = 1 / float(model.config.scaling_factor), float(getattr(model.config, "shift_factor", None) or 0.0)

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.vae = model

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = self.vae.decode(latents * factor + shift, return_dict=False)[0]
            return decoded

    return Decoder().eval()
