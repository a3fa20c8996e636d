"""Export a latent checkpoint's VAE decoder as an ONNX file, for a server that returns pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dq_export.core.documents import shown_path

from .checkpoint import CONFIG, broken_weights
from .config_values import VaeValues, refused
from .float_graph import trace
from .loading import load_weights, make_empty, read_config
from .old_names import todays_name
from .reference import Float32, ModelError
from .weights import find_weights

ARCHITECTURE = "AutoencoderKL"


LARGEST = 1024
"""The greatest height and width of latents in a graph that takes any."""
ROWS = 63
"""Samples of a call. diffusers' upsampling copies its input from 64 samples on, which changes no number."""


def export_decoder(vae: Path, shape: tuple[int, ...], path: Path, variant: str = "", *, resizable: bool = False) -> str:
    """Write `latents` float32[B, C, h, w] -> `sample` float32[B, 3, H, W] in [-1, 1], the latents' scaling undone first.

    Args:
        vae: a diffusers folder.
        shape: (C, h, w).
        variant: of the weights, where the folder has it.
        resizable: whether the graph takes latents of any height and width, not of this shape alone.

    Returns:
        Empty, or the reason why the VAE is not exported: it has another architecture, or is for other latents.

    Raises:
        ModelError: its files are missing, damaged, or do not fit each other.
    """
    import torch

    model = load_vae(vae, shape, variant)
    if model is None:
        return f"{shown_path(vae)} is no {ARCHITECTURE} of {shape[0]} channels: latents alone"
    network, names = wrapped(model, _decoded), ("latents", "sample")
    if resizable:
        graph = resizable_graph(network, names, shape[0])
    else:
        batch = torch.export.Dim("batch", min=1, max=ROWS)
        graph = trace(network, (torch.zeros(2, *shape),), [names[0]], [names[1]], [{0: batch}])
    path.parent.mkdir(parents=True)
    ir.save(graph, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    return ""


def resizable_graph(network: Any, names: tuple[str, str], channels: int, multiple: int = 1) -> ir.Model:
    """Export a module of one value whose height and width are any multiples of `multiple`.

    Args:
        names: of the graph's input and output.
        channels: of the value, [B, channels, H, W].
    """
    import torch

    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=ROWS)}
    for axis, name in ((2, "height"), (3, "width")):
        dim = torch.export.Dim(name if multiple == 1 else f"{name}_by_{multiple}", min=1, max=LARGEST)
        sizes[axis] = dim if multiple == 1 else multiple * dim
    example = torch.zeros(2, channels, 4 * multiple, 6 * multiple)
    return trace(network, (example,), [names[0]], [names[1]], [sizes])


def pixels_of_latent(vae: Path) -> int:
    """Return the pixels along a side of the picture that a VAE of ARCHITECTURE decodes from one latent."""
    return int(2 ** (len(read_config(vae / CONFIG).get("block_out_channels", (64,))) - 1))


def load_vae(vae: Path, shape: tuple[int, ...] | None, variant: str = "") -> Any:
    """The VAE of a folder; None where it is of another architecture, or for other latents. See `export_decoder`.

    Args:
        shape: of the latents; None: whatever it is for.
    """
    from diffusers import AutoencoderKL

    config = read_config(vae / CONFIG)
    if config.get("_class_name") != ARCHITECTURE or (shape and config.get("latent_channels", 4) != shape[0]):
        return None
    weights = find_weights(vae, variant, required=False)
    model = load_weights(make_empty(AutoencoderKL, VaeValues, vae / CONFIG, config), weights, rename=todays_name)
    if broken_weights(model):
        raise ModelError(f"{shown_path(vae)}: NaN or Inf in the VAE's weights; the checkpoint is damaged")
    _require_pictures(model, vae / CONFIG)
    return model


def pictures_of(vae: Any, latents: Float32) -> Float32:
    """Pictures float32[N, 3, H, W] of latents float32[N, C, h, w], decoded one at a time for the memory."""
    import torch

    with torch.inference_mode():
        return np.concatenate([_decoded(vae, torch.from_numpy(latents[i : i + 1])).numpy() for i in range(len(latents))])


def _require_pictures(model: Any, path: Path) -> None:
    """Decode zeros of 2 x 2, to find errors of a configuration that fits the weights but cannot decode."""
    import torch

    with refused(f"{shown_path(path)}: the VAE does not decode", "a value is wrong"), torch.inference_mode():
        shape = tuple(_decoded(model, torch.zeros(1, model.config.latent_channels, 2, 2)).shape)
    if shape[:2] != (1, 3):
        raise ModelError(f"{shown_path(path)}: the VAE decodes to {shape[1]} channels; expected 3")


def _decoded(model: Any, latents: Any) -> Any:
    """The picture of latents as the network samples them."""
    factor, shift = 1 / float(model.config.scaling_factor), float(getattr(model.config, "shift_factor", None) or 0.0)
    return model.decode(latents * factor + shift, return_dict=False)[0]


def wrapped(model: Any, call: Callable[[Any, Any], Any]) -> Any:
    """A module for `trace` that gives `call(model, value)` of its one value."""
    import torch

    class Wrapper(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.vae = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = call(self.vae, *values)
            return output

    return Wrapper().eval()
