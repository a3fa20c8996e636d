"""A checkpoint's VAE as two ONNX files, which scale nothing: pipelines do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .checkpoint import configuration
from .decoder import load_vae, wrapped
from .float_graph import INLINE, trace

LARGEST = 1024
"""Height and width of the latents that the graphs take."""
ROWS = 63
"""Samples of a call: diffusers' upsampling copies its input from 64 on, which changes no number."""


def export_vae(vae: Path, encoder: Path, decoder: Path, variant: str = "") -> Mapping[str, Any] | None:
    """Write a VAE's two graphs, of any height and width.

    The encoder: `sample` float32[B, 3, H, W] -> `latent_parameters` float32[B, 2C, h, w], mean and logarithm of the variance;
    the decoder: `latent_sample` float32[B, C, h, w] -> `sample` float32[B, 3, H, W]. H = h * 2^(levels - 1).

    Args:
        vae: a diffusers folder.
        encoder, decoder: files to write, in folders that are there.
        variant: of the weights, where the folder has it.

    Returns:
        The VAE's configuration; None where it is of another architecture, and nothing was written.

    Raises:
        ModelError: its files are missing, damaged, or do not fit each other.
    """
    model = load_vae(vae, None, variant)
    if model is None:
        return None
    pixels = 2 ** (len(model.config.block_out_channels) - 1)
    for call, names, channels, multiple, path in (
        (_encoded, ("sample", "latent_parameters"), model.config.in_channels, pixels, encoder),
        (_decoded, ("latent_sample", "sample"), model.config.latent_channels, 1, decoder),
    ):
        graph = _graph(wrapped(model, call), names, channels, multiple)
        ir.save(graph, path, external_data=f"{path.name}.data", size_threshold_bytes=INLINE)
    return dict(configuration(model))


def _graph(network: Any, names: tuple[str, str], channels: int, multiple: int) -> ir.Model:
    """Of a module of one value, whose height and width are any multiples of `multiple`."""
    import torch

    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=ROWS)}
    for axis, name in ((2, "height"), (3, "width")):
        dim = torch.export.Dim(name if multiple == 1 else f"{name}_by_{multiple}", min=1, max=LARGEST)
        sizes[axis] = dim if multiple == 1 else multiple * dim
    example = torch.zeros(2, channels, 4 * multiple, 6 * multiple)
    return trace(network, (example,), [names[0]], [names[1]], [sizes])


def _encoded(vae: Any, pictures: Any) -> Any:
    return vae.encode(pictures, return_dict=False)[0].parameters


def _decoded(vae: Any, latents: Any) -> Any:
    return vae.decode(latents, return_dict=False)[0]
