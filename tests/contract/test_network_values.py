"""Any value of a network's config.json is refused by its key, or makes a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import flux
import flux2
import pixart
import pytest
import sd3
import torch
import unet
from hypothesis import given
from hypothesis import strategies as st

from dq_export.families.config_values import require_values
from dq_export.families.flux2_values import Flux2Values
from dq_export.families.flux_values import FluxValues
from dq_export.families.pixart_values import PixArtValues
from dq_export.families.reference import ModelError
from dq_export.families.sd3_values import SD3Values
from dq_export.families.unet_values import UNetValues

NETWORKS = {
    "PixArtTransformer2DModel": (PixArtValues, pixart.TINY),
    "SD3Transformer2DModel": (SD3Values, sd3.TINY),
    "FluxTransformer2DModel": (FluxValues, flux.TINY),
    "Flux2Transformer2DModel": (Flux2Values, flux2.TINY),
    "UNet2DConditionModel": (UNetValues, unet.TINY),
}
JSON = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=3)
LAYERS = 8
"""Blocks of a network that are worth the time of making it."""


@pytest.mark.parametrize("architecture", NETWORKS)
@given(data=st.data(), value=JSON | st.lists(JSON, max_size=3))
def test_any_value_is_refused_or_makes_a_network(architecture: str, data: st.DataObject, value: Any) -> None:
    """Without memory for parameters: what is accepted here must not fail there."""
    values, tiny = NETWORKS[architecture]
    key = data.draw(st.sampled_from(sorted(values.model_fields)))
    config = {**json.loads(json.dumps(tiny)), key: value}  # lists, as a file has them
    network = getattr(diffusers, architecture)
    try:
        require_values(network, values, config, Path("config.json"))
    except ModelError as error:
        named = key in str(error)
    else:
        named = True
        if all(config.get(name, 0) <= LAYERS for name in ("num_layers", "num_single_layers")):
            with torch.device("meta"):
                network.from_config(config)
    assert named
