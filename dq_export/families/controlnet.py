"""A checkpoint's ControlNet, whose residuals its pipeline sends to its network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dq_export.core.documents import shown, shown_path

from .checkpoint import CONFIG, CONTROLNET, INDEX, Checkpoint, architecture_of, broken_weights
from .embeddings import settle_timesteps
from .loading import load_weights, make_empty, read_config
from .reference import ModelError
from .unet_values import ControlNetValues, layers_of
from .weights import Weights, find_weights

KIND = "ControlNetModel"
SHARED = (
    *("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim"),
    "projection_class_embeddings_input_dim",
)
"""Values that a ControlNet has in common with its network, beside the number of layers."""


def load_controlnet(checkpoint: Checkpoint, network: Any, place: Path | None) -> Any:
    """The ControlNet in evaluation mode, in float32.

    Args:
        network: the configuration of the network.
        place: see `load_weights`.

    Raises:
        ModelError: it is missing or damaged, or it does not fit the network.
    """
    from diffusers import ControlNetModel

    weights, path = controlnet_weights(checkpoint), checkpoint.home / CONTROLNET / CONFIG
    empty = make_empty(ControlNetModel, ControlNetValues, path, read_config(path))
    for key, value, expected in (
        *((key, getattr(empty.config, key), getattr(network, key)) for key in SHARED),
        ("layers_per_block", layers_of(empty.config), layers_of(network)),
    ):
        if _plain(value) != _plain(expected):
            raise ModelError(
                f"{shown_path(path)}: {key} {shown(_plain(value))}; expected {shown(_plain(expected))}, as in the network's "
                f"{CONFIG}: this ControlNet is for another network"
            )
    model = load_weights(empty, weights, place)
    if broken := broken_weights(model):
        raise ModelError(f"{shown_path(path.parent)}: NaN or Inf in {len(broken)} weights ({broken[0]} …); download it again")
    settle_timesteps(model)
    return model


def controlnet_weights(checkpoint: Checkpoint) -> Weights:
    """The files of weights.

    Raises:
        ModelError: they are missing, or the index names another class, such as several ControlNets.
    """
    entry, folder = checkpoint.index.get(CONTROLNET), checkpoint.home / CONTROLNET
    if not isinstance(entry, list) or entry[-1:] != [KIND]:
        raise ModelError(
            f"{shown_path(checkpoint.home / INDEX)}: {CONTROLNET} is {shown(entry)}; expected ['diffusers', '{KIND}'] in a "
            f"{checkpoint.pipeline}; of several ControlNets name one: the engine takes the sums of their residuals"
        )
    if not os.path.lexists(folder / CONFIG):
        raise ModelError(
            f"{shown_path(checkpoint.home / INDEX)}: names a {CONTROLNET}, and there is no {CONTROLNET}/{CONFIG}; copy or "
            "download it again"
        )
    if (name := architecture_of(read_config(folder / CONFIG))) != KIND:
        raise ModelError(f"{shown_path(folder / CONFIG)}: _class_name is {shown(name)}; expected {KIND}")
    return find_weights(folder, checkpoint.weights.variant, required=False)


def _plain(value: Any) -> Any:
    """A value of a configuration, which diffusers holds as tuples or as lists."""
    return list(value) if isinstance(value, (list, tuple)) else value
