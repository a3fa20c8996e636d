"""What a server has to know to call a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a server calls one network; see `Family` for what is not described here.

    Args:
        size_values: those that the network takes.
        batched: whether all inputs have a row for each picture; positions may not.
        tokens: whether the state holds the places of the latents one after the other, [B, h * w, C].
        follows_size: whether the sampler's timesteps follow the picture's size.
    """

    requests: Mapping[str, str]
    size_values: Mapping[str, tuple[float | str, ...]]
    zero_null: bool
    lowercase: bool
    template: str
    batched: bool
    tokens: bool
    picture_positions: Mapping[str, tuple[str, ...]]
    text_positions: Mapping[str, tuple[str, ...]]
    packing: int
    follows_size: bool
