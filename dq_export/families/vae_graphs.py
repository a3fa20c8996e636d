"""A checkpoint's VAE as two ONNX files, which scale nothing: pipelines do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .checkpoint import CONFIG, configuration
from .decoder import load_vae, resizable_graph, wrapped
from .float_graph import INLINE
from .loading import read_config
from .vae_classes import KL, class_of


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
    if class_of(read_config(vae / CONFIG)) is not KL:
        return None
    model = load_vae(vae, None, variant)
    pixels = 2 ** (len(model.config.block_out_channels) - 1)
    for call, names, channels, multiple, path in (
        (_encoded, ("sample", "latent_parameters"), model.config.in_channels, pixels, encoder),
        (_decoded, ("latent_sample", "sample"), model.config.latent_channels, 1, decoder),
    ):
        graph = resizable_graph(wrapped(model, call), names, channels, multiple)
        ir.save(graph, path, external_data=f"{path.name}.data", size_threshold_bytes=INLINE)
    return dict(configuration(model))


def _encoded(vae: Any, pictures: Any) -> Any:
    return vae.encode(pictures, return_dict=False)[0].parameters


def _decoded(vae: Any, latents: Any) -> Any:
    return vae.decode(latents, return_dict=False)[0]
