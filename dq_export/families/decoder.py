"""A latent checkpoint's VAE: its decoder as an ONNX file for a server, and the pictures of latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dq_export.core.documents import shown, shown_path
from dq_export.core.progress import Advance

from .checkpoint import CONFIG, broken_weights
from .config_values import refused
from .float_graph import trace
from .loading import load_weights, make_empty, read_config
from .old_names import todays_name
from .reference import Float32, ModelError
from .tensors import stored
from .vae_classes import CLASSES, VaeClass, class_of, read_vae
from .vae_values import VaeValues
from .weights import find_weights

LARGEST = 1024
"""The greatest height and width of latents in a graph that takes any."""
ROWS = 63
"""Samples of a call. diffusers' upsampling copies its input from 64 samples on, which changes no number."""
TILE = 512
"""Pixels along a side of the tiles that `pictures_of` decodes a larger picture in: a picture of 1024 x 1024 takes four times
their memory at once."""
ACTIVATIONS = 4.4
"""The largest activations that decoding holds at once: 4.3 of them at 256 pixels and 4.1 at 512 in Stable Diffusion's decoder."""


@dataclass(frozen=True)
class Decoding:
    """How a decoder takes latents.

    Args:
        packing: latents along a side that lie in the channels of one place.
        variant: of the weights, where the folder has it.
        resizable: whether the graph takes latents of any height and width, not of one shape alone.
    """

    packing: int = 1
    variant: str = ""
    resizable: bool = False


PLAIN = Decoding()


def export_decoder(vae: Path, shape: tuple[int, ...], path: Path, decoding: Decoding = PLAIN) -> str:
    """Write `latents` float32[B, C, h, w] -> `sample` float32[B, 3, H, W] in [-1, 1], the latents' scaling undone first.

    Args:
        vae: a diffusers folder.
        shape: (C, h, w).

    Returns:
        Empty, or the reason why the VAE is not exported: it has another architecture, or is for other latents.

    Raises:
        ModelError: its files are missing, damaged, or do not fit each other.
    """
    import torch

    packing = decoding.packing
    unpacked = (shape[0] // packing**2, *(packing * side for side in shape[1:]))
    model = load_vae(vae, unpacked, decoding.variant)
    if model is None:
        return f"{shown_path(vae)}: {misfit(vae, unpacked)}: latents alone"

    def decoded(vae: Any, latents: Any) -> Any:
        # `FluxPipeline._unpack_latents`: the channels of a token are those of 2 x 2 latents.
        return _decoded(vae, torch.nn.functional.pixel_shuffle(latents, packing) if packing > 1 else latents)

    network, names = wrapped(model, decoded), ("latents", "sample")
    if decoding.resizable:
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
    """Return the pixels along a side of the picture that a VAE of one of CLASSES decodes from one place of the latents."""
    kind, values = _read(vae)
    return kind.pixels(values)


def _read(vae: Path) -> tuple[VaeClass, VaeValues]:
    read = read_vae(vae)
    assert read is not None  # see `misfit`
    return read


def load_vae(vae: Path, shape: tuple[int, ...] | None, variant: str = "") -> Any:
    """The VAE of a folder; None where it is of another class, or for other latents. See `export_decoder`.

    Args:
        shape: of the latents; None: whatever it is for.
    """
    import diffusers

    if misfit(vae, shape):
        return None
    kind, values = _read(vae)
    config = read_config(vae / CONFIG)
    weights = find_weights(vae, variant, required=False)
    empty = make_empty(getattr(diffusers, kind.name), kind.values, vae / CONFIG, config)
    model = load_weights(empty, weights, rename=todays_name)
    if broken_weights(model):
        raise ModelError(f"{shown_path(vae)}: NaN or Inf in the VAE's weights; the checkpoint is damaged")
    _require_pictures(model, kind.channels(values), vae / CONFIG)
    return model


def misfit(vae: Path, shape: tuple[int, ...] | None) -> str:
    """Why the VAE of a folder does not decode latents of a shape (C, h, w), None: whatever it is for; empty if it does.

    Raises:
        ModelError: see `read_vae`.
    """
    read = read_vae(vae)
    if read is None:
        name = read_config(vae / CONFIG).get("_class_name")
        return f"its VAE is of class {shown(name)}, not {' or '.join(item.name for item in CLASSES)}"
    kind, values = read
    if shape and kind.channels(values) != shape[0]:
        return f"its VAE takes latents of {kind.channels(values)} channels, and the network draws {shape[0]}"
    return ""


def undecodable(vae: Path, shape: tuple[int, ...], variant: str = "") -> str:
    """Why the VAE of a folder makes no pictures of latents of a shape (C, h, w): see `misfit`, or a file is missing."""
    if not (vae / CONFIG).is_file():
        return f"its VAE has no {CONFIG}"
    if reason := misfit(vae, shape):
        return reason
    try:
        find_weights(vae, variant, required=False)
    except ModelError as error:
        return f"its VAE is incomplete ({error})"
    return ""


def decoding_bytes(vae: Path, shape: tuple[int, ...], variant: str = "") -> int:
    """Bytes that `pictures_of` takes for latents of a shape (C, h, w), with the VAE's float32 weights.

    Raises:
        ModelError: files are missing or damaged, or a value of the configuration is wrong.
    """
    kind, values = _read(vae)
    shapes = [place.shape for file in find_weights(vae, variant, required=False).files for place in stored(file).values()]
    pixels = math.prod(min(kind.pixels(values) * side, TILE) for side in shape[1:])
    # The last upsampling has the picture's size and the width of the level below.
    return sum(4 * math.prod(sizes) for sizes in shapes) + int(ACTIVATIONS * 4 * pixels * values.decoder_widths[:2][-1])


def pictures_of(vae: Any, latents: Float32, progress: Advance) -> Float32:
    """Pictures float32[N, 3, H, W] of latents float32[N, C, h, w], decoded one at a time for the memory.

    Pictures with a side of more than TILE pixels are decoded in tiles that overlap by a quarter, as diffusers does it.

    Args:
        progress: called with (pictures decoded, all pictures, their name).
    """
    import torch

    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = []
    with torch.inference_mode():
        for done, sample in enumerate(torch.from_numpy(latents).split(1), start=1):
            pictures.append(_decoded(vae, sample).numpy())
            progress(done, len(latents), "pictures")
    return np.concatenate(pictures)


def _require_pictures(model: Any, channels: int, path: Path) -> None:
    """Decode zeros of 2 x 2, to find errors of a configuration that fits the weights but cannot decode."""
    import torch

    with refused(f"{shown_path(path)}: the VAE does not decode", "a value is wrong"), torch.inference_mode():
        picture = _decoded(model, torch.zeros(1, channels, 2, 2))
    if tuple(picture.shape[:2]) != (1, 3):
        raise ModelError(f"{shown_path(path)}: the VAE decodes to {picture.shape[1]} channels; expected 3")
    if not torch.isfinite(picture).all():
        raise ModelError(f"{shown_path(path)}: the VAE decodes zeros to NaN or Inf; the checkpoint is damaged")


def _decoded(model: Any, latents: Any) -> Any:
    """The picture of latents as the network samples them."""
    kind = class_of(model.config)
    assert kind is not None  # see `load_vae`
    return model.decode(kind.unscale(model, latents), return_dict=False)[0]


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
